"""Rank 2: the verb `configs`: the shipped recipes, from wherever the package is installed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from sdpo_lightning.spelling import did_you_mean
from sdpo_lightning.types import ConfigurationError
from sdpo_lightning.verbs import verb_parser


def run_configs(words: Sequence[str]) -> None:
    """List the recipes, or copy one.

    Args:
        words: after `configs`: `ls`, or `cp NAME [TO]`.

    Raises:
        ConfigurationError: an unknown name, or a file that is there already.
    """
    options = verb_parser("configs").parse_args(list(words))
    recipes = dict(_recipes(resources.files("sdpo_lightning.configs")))
    if options.action == "ls":
        if options.name is not None:
            raise ConfigurationError(f"`configs ls` takes no word, got {options.name!r}")
        width = max(map(len, recipes))
        for name, recipe in recipes.items():
            print(f"{name:{width}}  {first_comment(recipe.read_text(encoding='utf-8'))}")
        return
    if options.name is None:
        raise ConfigurationError("`configs cp` needs a name; `configs ls` lists them")
    print(f"written: {_copy(recipes, options.name, options.to)}")


def first_comment(text: str) -> str:
    """The first line of a recipe that is a comment, without its `#`; empty where there is none."""
    lines = (line for line in text.splitlines() if line.startswith("#") and not line.startswith("#!"))
    return next(lines, "").lstrip("# ").rstrip()


def _recipes(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, Traversable]]:
    inner = sorted(folder.iterdir(), key=lambda entry: (entry.is_dir(), entry.name))
    for entry in inner:
        if entry.is_dir() and not entry.name.startswith("_"):
            yield from _recipes(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith((".yaml", ".sbatch")):
            yield f"{prefix}{entry.name.removesuffix('.yaml')}", entry


def _copy(recipes: dict[str, Traversable], given: str, to: str | None) -> Path:
    name = given.removesuffix(".yaml")
    if name not in recipes:
        hint = did_you_mean(name, recipes) or "; `configs ls` lists them"
        raise ConfigurationError(f"there is no recipe {given!r}{hint}")
    target = Path(to or ".")
    if target.is_dir() or (to or "").endswith("/"):
        target = target / recipes[name].name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Fails where the file is there, whoever made it in the meantime.
        with target.open("x", encoding="utf-8") as handle:
            handle.write(recipes[name].read_text(encoding="utf-8"))
    except FileExistsError as error:
        hint = f"give another name: `configs cp {name} TO`"
        raise ConfigurationError(f"{str(target)!r} is there already; {hint}") from error
    return target
