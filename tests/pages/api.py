"""Write the API section of swap_hpc/README.md from the signatures and docstrings of the code.

python tests/pages/api.py
"""

import ast
import inspect
import re
import textwrap
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "swap_hpc" / "README.md"
BEGIN = "<!-- made by tests/pages/api.py -->"
END = "<!-- end of what tests/pages/api.py makes -->"
DESCRIPTORS = (classmethod, staticmethod, property)
LINE = 96  # characters; a longer signature has a line for each parameter

SECTIONS = {
    "For a training loop of your own": (
        "swap_hpc:Team",
        "swap_hpc:grid",
        "swap_hpc.parallel.grid:Ranks",
        "swap_hpc:average_weights_",
        "swap_hpc:WeightSum",
        "swap_hpc:refresh_batchnorm_",
        "swap_hpc:evaluate",
        "swap_hpc:Metric",
        "swap_hpc:weights_sha256",
        "swap_hpc:distributed_environment",
    ),
    "For data of your own": (
        "swap_hpc:Dataset",
        "swap_hpc.data:Arrays",
        "swap_hpc.data:Files",
        "swap_hpc:Batches",
        "swap_hpc:Batches.of",
        "swap_hpc:Graph",
        "swap_hpc.data:Picks",
    ),
    "The algorithm, and the events that it yields": (
        "swap_hpc.swap:swap",
        "swap_hpc.train.fit:fit",
        "swap_hpc.train.events:Epoch",
        "swap_hpc.train.events:Evaluation",
        "swap_hpc.train.events:SavePoint",
        "swap_hpc.train.events:Saves",
        "swap_hpc.train.events:SyncPoint",
        "swap_hpc.train.events:LargeBatchEnded",
        "swap_hpc.train.events:GroupArrived",
        "swap_hpc.train.events:GroupsArrived",
        "swap_hpc.train.events:Averaged",
        "swap_hpc.train.events:Continued",
        "swap_hpc.train.events:Refreshed",
    ),
}


def with_section(page: str) -> str:
    """Return the text of the page with what stands between the two markers made anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{section()}\n{END}{after}"


def section() -> str:
    """Return the section's Markdown."""
    parts = []
    for title, names in SECTIONS.items():
        parts.append(f"### {title}\n")
        parts += [_entry(name) for name in names]
    return "\n".join(parts)


def _entry(path: str) -> str:
    module, _, name = path.partition(":")
    thing: Any = import_module(module)
    for each in name.split("."):
        thing = getattr(thing, each)
    fields = isinstance(thing, type) and is_dataclass(thing)
    code = _fields(thing) if fields else _signature(name, thing)
    parts = [f"#### `{module}.{name}`\n", f"```python\n{code}\n```\n"]
    # A dataclass without a docstring gets its signature for one, which the code above has.
    if (doc := inspect.getdoc(thing)) and not doc.startswith(f"{name}("):
        parts.append(f"{_markdown(doc)}\n")
    if inspect.isclass(thing) and not fields:
        parts.append(_methods(thing))
    return "\n".join(parts)


def _signature(name: str, thing: Any) -> str:
    """Return a function's signature, or that of a class's constructor, as its source has it."""
    function = thing.__init__ if inspect.isclass(thing) else thing
    head = f"class {name}" if inspect.isclass(thing) else name
    parameters, returned = _parameters(function)
    arrow = "" if inspect.isclass(thing) else f" -> {returned}"
    line = f"{head}({', '.join(parameters)}){arrow}"
    if len(line) <= LINE:
        return line
    lines = "".join(f"    {parameter},\n" for parameter in parameters)
    return f"{head}(\n{lines}){arrow}"


def _parameters(function: Any) -> tuple[list[str], str]:
    """Return `name: type = default` of each parameter but self, and the type that is returned.

    From the source: how `inspect` prints types depends on Python's version.
    """
    definition = _definition(function)
    assert isinstance(definition, ast.FunctionDef)
    arguments = definition.args
    required = [None] * (len(arguments.args) - len(arguments.defaults))
    texts = [
        _parameter(argument, default)
        for argument, default in zip(arguments.args, [*required, *arguments.defaults], strict=True)
    ]
    if arguments.vararg:
        texts.append(f"*{_parameter(arguments.vararg)}")
    elif arguments.kwonlyargs:
        texts.append("*")
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        texts.append(_parameter(argument, default))
    own = [text for text in texts if text not in ("self", "cls")]
    return own, _type(definition.returns) if definition.returns else "None"


def _parameter(argument: ast.arg, default: ast.expr | None = None) -> str:
    text = argument.arg + (f": {_type(argument.annotation)}" if argument.annotation else "")
    return text if default is None else f"{text} = {ast.unparse(default)}"


def _type(annotation: ast.expr) -> str:
    return ast.unparse(annotation).strip("'")  # a forward reference is a string


def _definition(thing: Any) -> ast.stmt:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    return definition


def _fields(kind: type) -> str:
    """Return the fields of a dataclass as its source has them, with their comments."""
    definition = _definition(kind)
    assert isinstance(definition, ast.ClassDef)
    fields = [node for node in definition.body if isinstance(node, ast.AnnAssign)]
    last = fields[-1].end_lineno
    lines = textwrap.dedent(inspect.getsource(kind)).splitlines()
    head = lines[definition.lineno - 1]
    return "\n".join([head, *lines[fields[0].lineno - 1 : last]])


def _methods(kind: type) -> str:
    """Return a list of a class's own public methods, each with its docstring's first line."""
    names = [
        name
        for name, thing in vars(kind).items()
        if not name.startswith("_") and (callable(thing) or isinstance(thing, DESCRIPTORS))
    ]
    return "".join(f"- {_method(name, getattr(kind, name))}\n" for name in names)


def _method(name: str, method: Any) -> str:
    doc = inspect.getdoc(method)
    if isinstance(method, property):
        head = f"{name}: {_parameters(method.fget)[1]}"
    else:
        head = _signature(name, method)
    return f"`{head}`" + (f": {_escaped(doc.splitlines()[0])}" if doc else "")


def _markdown(doc: str) -> str:
    """Return a docstring in Google style as Markdown: its sections become lists."""
    parts = []
    for part in re.split(r"\n\n+", doc):
        head, _, body = part.partition("\n")
        if head in ("Args:", "Attributes:", "Raises:"):
            parts.append(f"{head}\n\n{_items(textwrap.dedent(body))}")
        elif head in ("Returns:", "Yields:"):
            parts.append(f"{head} {_escaped(' '.join(body.split()))}")
        else:
            parts.append(_escaped(part))
    return "\n\n".join(parts)


def _items(body: str) -> str:
    """Return `name: text` entries, whose further lines are indented, as a list."""
    items = []
    for entry in re.split(r"\n(?=\S)", body):
        text = " ".join(entry.split())
        name, colon, what = text.partition(": ")
        named = colon and re.fullmatch(r"\*{0,2}[\w.]+", name)
        items.append(f"- `{name}`: {_escaped(what)}" if named else f"- {_escaped(text)}")
    return "\n".join(items)


def _escaped(text: str) -> str:
    """Keep `<` outside of code from being taken for HTML."""
    parts = text.split("`")
    parts[::2] = [part.replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


if __name__ == "__main__":
    PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
