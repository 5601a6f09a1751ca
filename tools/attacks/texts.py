"""Texts that somebody might write: options, chat templates, tables and data."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from random import Random

from attacks.pickles import CODE_RAN
from attacks.tables import DEEP, LONG, text_of

LAYER = "model.layers.0.self_attn.q_proj"
ALIASES = "".join(f"{name}: &{name} [{', '.join([f'*{one}'] * 5)}]\n" for one, name in pairwise("abcdefgh"))
STRINGS: Mapping[str, Sequence[str]] = {
    "*.yaml": (
        f"a: &a [x, x, x]\n{ALIASES}map: [*h, *h, *h, *h]\n",
        f"out: !!python/object/apply:builtins.open ['{CODE_RAN}', 'w']\n",
        "a: &a [*a]\nmap: *a\n",
        f"{'[' * 5_000}",
        "- a\n- b\n",
        "steps: 3\nsteps: 4\n",
        "steps: [1, 2]\n",
        "steps: 1e3\n",
        "steps: .nan\n",
        "learning_rate: .inf\n",
        "out: null\n",
        "out:\n  a: b\n",
        "? [a, b]\n: c\n",
        "1: 2\n",
        "steps: 2026-11-28\n",
        f"steps: {LONG}\n",
        "\tsteps: 3\n",
        "steps: 3\n---\nsteps: 4\n",
        "no_such_option: 3\n",
        "base: '[/b]'\n",
        "base: 3\n",
        "!!binary x\n",
        "steps: !x 3\n",
        "max_length: 0x10\n",
        'out: "a\\0b"\n',
        "<<: 3\n",
    ),
    "*.jinja": (
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        f"{{{{ cycler.__init__.__globals__.os.system('touch {CODE_RAN}') }}}}",
        "{% for m in messages %}",
        "{{ 1 / 0 }}",
        "{{ messages[99].content }}",
        "{{ raise_exception('no') }}",
        "{% include 'x' %}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{{ 'x' * 100000000 }}",
        "{{ messages }}",
        "",
        "{{ nothing.there }}",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{{ strftime_now('%Y') }}",
        "{% generation %}{% generation %}x{% endgeneration %}{% endgeneration %}",
        "{{ ''.join(messages) }}",
        "\udcff",
    ),
    "*bits.txt": (
        "model.layers.0.x nf4 3\n",
        "# qsvd allocation\n",
        "a b c d e\n",
        f"{LAYER} nf3-64-8x256 -1\n",
        f"{LAYER} nf3-64-8x256 9999999\n",
        f"{LAYER} nf9-64-8x256 4\n",
        f"{LAYER} nf3-64-8x256 {LONG}\n",
        f"{LAYER} nf3-0-8x256 4\n",
    ),
    "*.csv": (
        "text\n",
        "a,b\n1,2\n",
        'text\n"no end\n',
        "text,label\nx\n",
        "text\n\x00\n",
        "text,text\na,b\n",
        "\n\n\n",
        f"text\n{'z' * 200_000}\n",
        "label,text\n,\n",
    ),
    "*.jsonl": (
        '{"text": null}\n',
        '{"text": 5}\n',
        '{"text": ""}\n',
        '{"text": ["a"]}\n',
        "[]\n",
        '{"text": "\\ud800"}\n',
        '{"a": 1}\n',
        '{"text": "a"}\n{"other": "b"}\n',
        '{"messages": []}\n',
        '{"messages": [{"role": "user"}]}\n',
        '{"messages": [{"role": 3, "content": {}}]}\n',
        '{"messages": "x"}\n',
        '{"messages": [{"role": "robot", "content": "x"}, {"role": "assistant", "content": "y"}]}\n',
        '{"text": "a", "label": {}}\n',
        '{"input_ids": [1, 2, 99999]}\n',
        '{"prompt": 1, "completion": 2}\n',
        f'{{"text": "{"w" * 300_000}"}}\n',
        f'{{"text": {LONG}}}\n',
        f'{{"text": "a"}}\n{DEEP}\n',
    ),
    "*.txt": (
        "",
        "\x00\x00\x00",
        "\n\n\n\n",
        f"{'z' * 300_000}",
        "\udcff\udcfe",
        "\ufeffabc",
        "<|eos|><|bos|><|pad|>",
    ),
    "*data.json": (
        "{}",
        "[1]",
        '{"text": ["a", "b"]}',
        '[{"text": "a"}, 3]',
        '[{"text": null}]',
        "[[]]",
        '"text"',
        '{"data": [{"text": "a"}]}',
    ),
}


def written(path: Path, random: Random) -> str | None:
    """Write a text that somebody might write: alone, or before or after what is there."""
    texts = [text for pattern, many in STRINGS.items() if fnmatch(path.name, pattern) for text in many]
    if not texts:
        return None
    text, old = random.choice(texts), text_of(path)
    path.write_text(random.choice([text, old + text, text + old]), errors="surrogateescape")
    return f"has {text[:60]!r}"
