# scipy has no annotations, and pyright takes half a minute to infer them.
from typing import Any

def __getattr__(name: str) -> Any: ...
