"""Make qsvd's quantization method known to transformers, so that from_pretrained opens a model of mixed bits.

`import qsvd` is enough, before or after transformers. The method is registered as soon as transformers' own list of
methods (transformers.quantizers.auto) is loaded, so that `import qsvd` loads neither transformers nor torch.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

TRANSFORMERS_METHODS = "transformers.quantizers.auto"
OUR_METHOD = "qsvd.adapters.quantizer"  # registers itself when it is imported


class _AfterTransformers(MetaPathFinder):
    """Import hook that loads our method right after transformers' methods."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname != TRANSFORMERS_METHODS:
            return None
        sys.meta_path.remove(self)  # its work is done, and the next line must ask the other finders
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                import_module(OUR_METHOD)

            spec.loader.exec_module = run_and_register
        return spec


def register() -> None:
    """Register the method now if transformers' methods are loaded, otherwise when they are."""
    if TRANSFORMERS_METHODS in sys.modules:
        import_module(OUR_METHOD)
    else:
        sys.meta_path.insert(0, _AfterTransformers())


register()
