"""The tokens of large data on disk: made once, and mapped by every later start and by every process.

HF_DATASETS_CACHE/qsvd-tokens/FINGERPRINT/ has tokens.arrow and tokens.json, which is written last and has the digest of
the other. The fingerprint is that of the data, the tokenizer and all that decides which tokens there are.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from qsvd import ranks
from qsvd.data.chat import chat_template
from qsvd.data.columns import COLUMNS, Examples, Tokenized, recognise
from qsvd.data.large.blocks import RowBlocks, large_rows
from qsvd.data.large.mapped import MappedTokens, mapped_table
from qsvd.data.masks import Share, check_left, check_marked
from qsvd.data.tokens import tokenize_part
from qsvd.errors import BadInput, Damaged
from qsvd.files.atomic import Lock, file_digest, read_record, whole_file, write_record
from qsvd.inputs.model_files import TOKENIZER

FORMAT = 1  # of the files; another one is another fingerprint
TOKENS, RECORD, LOCK = "tokens.arrow", "tokens.json", "tokens.lock"


@dataclass(frozen=True)
class Recipe:
    """How rows become tokens.

    Args:
        folder: Of the tokenizer.
        mapping: Columns of the files -> our names.
        labels: As of `recognise`.
        chosen: max_length, loss_on and stop_ids of `tokenize`.
    """

    tokenizer: Any
    folder: Path
    mapping: Mapping[str, str]
    labels: bool
    chosen: Mapping[str, Any]

    def fingerprint(self, blocks: RowBlocks) -> str:
        """Return what the tokens depend on, as a name of a folder."""
        import tokenizers
        import transformers

        names = sorted(
            {path for one in (*TOKENIZER.files, *TOKENIZER.others, "config.json") for path in self.folder.glob(one)}
        )
        template = chat_template(self.tokenizer)
        texts = [] if template is None else [template.plain, template.with_tools]
        parts = {
            "format": FORMAT,
            "data": blocks.digests,
            "suffix": blocks.files[0].suffix.lower(),
            "tokenizer": [[path.name, file_digest(path)] for path in names if path.is_file()],
            "templates": texts,
            "date": date.today().isoformat() if any("strftime_now" in text for text in texts) else None,
            "mapping": dict(self.mapping),
            "labels": self.labels,
            "versions": [transformers.__version__, tokenizers.__version__],
            **self.chosen,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class LargeTexts:
    """Large data of texts, pairs or conversations.

    Args:
        first: The first examples.
        columns: Of the files, those with a value in any row.
        folder: Of the tokens on disk.
        kept: Their record, if they are there.
    """

    blocks: RowBlocks
    recipe: Recipe
    first: Examples
    columns: Sequence[str]
    folder: Path
    kept: Mapping[str, Any] | None

    def tokens(self) -> Tokenized:
        """Return the tokens, mapped; make them first, if they are not there.

        Raises:
            BadInput: as `recognise` and `tokenize`, of the first block with a fault; their folder cannot be made.
            OSError: the files cannot be written.
        """
        kept = self.kept
        if kept is None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = _lock(self.folder)
            except OSError as error:
                raise BadInput(
                    f"{self.folder} for the tokens of {self.blocks.source} cannot be made ({error.strerror}): set the "
                    "environment variable HF_DATASETS_CACHE to a folder that can be written"
                ) from error
            with lock:
                kept = _kept(self.folder) or _made(self.folder, self.blocks, self.recipe, self.columns)
        return _opened(self.folder, kept, self.blocks, self.first)


def open_large(source: str, split: str, recipe: Recipe) -> LargeTexts | None:
    """Return the data of a split if they are large and their tokens can be kept on disk, else None.

    Classes, images and sounds cannot.

    Raises:
        BadInput: as `read_rows` and `recognise`.
    """
    blocks = large_rows(source, split)
    if blocks is None:
        return None
    folder = cache_folder() / recipe.fingerprint(blocks)
    kept = _kept(folder)
    columns = blocks.columns() if kept is None else kept["columns"]
    first = recognise(blocks.first(), recipe.mapping, labels=recipe.labels, columns=columns)
    is_text = first.kind in ("chat", "pair", "text") and not {recipe.mapping.get(n, n) for n in columns} & {*COLUMNS}
    return LargeTexts(blocks, recipe, first, columns, folder, kept) if is_text else None


def cache_folder() -> Path:
    """Return the folder of all such files, in the cache of the datasets library."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "qsvd-tokens"


def _kept(folder: Path) -> dict[str, Any] | None:
    """Return the record of complete and undamaged files, else None; of damaged ones a line of the log says so."""
    if not (folder / RECORD).is_file():
        return None
    try:
        kept = read_record(folder / RECORD)
        if not (folder / TOKENS).is_file() or file_digest(folder / TOKENS) != kept["tokens"]:
            raise Damaged(f"{folder / TOKENS} is damaged")
    except (BadInput, Damaged, OSError, KeyError) as error:
        logging.getLogger("qsvd").warning("%s; the data are tokenized again", str(error).partition(";")[0])
        return None
    return kept


def _lock(folder: Path) -> Lock:
    """Return the lock of a folder; wait while another process makes its files."""
    found, told = list[Lock](), list[bool]()

    def is_free() -> bool:
        try:
            found.append(Lock(folder / LOCK, folder))
        except BadInput as error:
            if not isinstance(error.__cause__, BlockingIOError):
                raise
            if not told:
                logging.getLogger("qsvd").warning("another process makes the tokens in %s; waiting for it", folder)
                told.append(True)
        return bool(found)

    ranks.wait_until(is_free)
    return found[0]


def _made(folder: Path, blocks: RowBlocks, recipe: Recipe, columns: Sequence[str]) -> dict[str, Any]:
    """Tokenize all rows into the files, and return their record."""
    import pyarrow

    logging.getLogger("qsvd").warning("%s: tokenized into %s, which later runs use", blocks.source, folder)
    numbers = pyarrow.list_(pyarrow.int32())
    names = {"input_ids": numbers, "labels": numbers, "shard": pyarrow.int32(), "number": pyarrow.int64()}
    schema = pyarrow.schema(list(names.items()))
    share, found = Share(), list[Tokenized]()
    with whole_file(folder / TOKENS) as file, pyarrow.ipc.new_stream(file, schema) as writer:
        for data in _parts(blocks, recipe, columns, share):
            places: Any = data.places
            values = (data.input_ids, data.labels, list(places.shards), list(places.numbers))
            arrays = [pyarrow.array(one, kind) for one, kind in zip(values, names.values(), strict=True)]
            writer.write_batch(pyarrow.RecordBatch.from_arrays(arrays, schema=schema))
            found.append(data.take([]))  # its counts
        if recipe.chosen["loss_on"] == "answers" and found[0].kind != "text":
            check_marked(share.trained, share.total, blocks.source)
        check_left(share, sum(data.dropped for data in found), recipe.chosen["max_length"], blocks.source)
    kept = {
        "tokens": file_digest(folder / TOKENS),
        "columns": list(columns),
        "truncated": sum(data.truncated for data in found),
        "dropped": sum(data.dropped for data in found),
        "cut_tokens": sum(data.cut_tokens for data in found),
        "has_template": found[0].has_template,
    }
    write_record(folder / RECORD, kept)
    return kept


def _parts(blocks: RowBlocks, recipe: Recipe, columns: Sequence[str], share: Share) -> Iterator[Tokenized]:
    """Yield the tokens of every block; add to `share` what all of them have together."""
    form = None
    for rows in blocks.blocks():
        examples = recognise(rows, recipe.mapping, labels=recipe.labels, columns=columns, form=form)
        form = type(examples.rows[-1].get("prompt"))
        yield tokenize_part(examples, recipe.tokenizer, share, **recipe.chosen)


def _opened(folder: Path, kept: Mapping[str, Any], blocks: RowBlocks, first: Examples) -> Tokenized:
    path = folder / TOKENS
    table = mapped_table(path)
    return Tokenized(
        first.kind,
        MappedTokens(path, "input_ids"),
        MappedTokens(path, "labels"),
        blocks.places(table["number"].to_numpy(), table["shard"].to_numpy()),
        truncated=kept["truncated"],
        dropped=kept["dropped"],
        cut_tokens=kept["cut_tokens"],
        columns=first.columns,
        has_template=kept["has_template"],
    )
