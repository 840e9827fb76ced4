"""Labels and the names of their classes. Labels of two sets compare by these names, never by two different orders."""

from collections.abc import Sequence

import numpy as np

from sra_jax.errors import UserError

SHOWN = 5

Names = Sequence[str] | None


def described(num_classes: int, names: Names) -> str:
    """Which label stands for which class: `3 classes: 0 = bird, 1 = cat, 2 = dog`.

    Args:
      num_classes: labels run from 0 to num_classes - 1.
      names: one a class, or None where a set only has numbers.
    """
    count = f"{num_classes:,} class{'es' if num_classes != 1 else ''}"
    if names is None:
        return f"{count} without names"
    if all(name == str(label) for label, name in enumerate(names)):
        return f"{count}, 0 to {num_classes - 1}"
    pairs = [f"{label} = {name}" for label, name in enumerate(names)]
    shown = pairs if num_classes <= 2 * SHOWN else [*pairs[:SHOWN], "...", pairs[-1]]
    moved = next((label for label, name in enumerate(names) if _is_number(name) and int(name) != label), None)
    warning = "" if moved is None else (
        f". Names that are numbers are in the order of text, as torchvision has them: label {moved} is the class "
        f"{names[moved]}"
    )  # fmt: skip
    return f"{count}: {', '.join(shown)}{warning}"


def translation(given: Names, num_given: int, known: Names, num_known: int, what: str, of: str) -> np.ndarray:
    """The labels of one set in the numbering of another, by the classes' names.

    Numbers without names are their own names: label 2 of a set without names is the class `2` of one that has it.

    Args:
      given: names of the classes whose labels are to be translated, or None.
      num_given: how many.
      known: names of the classes of the other set, or None.
      num_known: how many.
      what: names the first set in messages.
      of: names the other one.

    Returns:
      (num_given,) int64: the other set's label of each class.

    Raises:
      UserError: a class has no counterpart, so that labels do not compare.
    """
    if given is None and known is None:
        if num_given > num_known:
            raise UserError(
                f"labels of {what} and of {of} do not compare: they run to {num_given - 1} and to {num_known - 1}"
            )
        return np.arange(num_given)
    given, known = _comparable(given, num_given), _comparable(known, num_known)
    if all(map(_is_number, (*given, *known))):
        given, known = ([str(int(name)) for name in names] for names in (given, known))
    places = {name: label for label, name in enumerate(known)}
    missing = [name for name in given if name not in places]
    if missing:
        raise UserError(
            f"labels of {what} and of {of} do not compare: classes go by their names, and {of} has no class "
            f"{', '.join(missing[:SHOWN])}{', ...' if len(missing) > SHOWN else ''}; it has "
            f"{described(num_known, known)}"
        )
    return np.array([places[name] for name in given], np.int64)


def check_same(learned: Names, names: Names, what: str) -> None:
    """Raises a `UserError` where labels mean other classes than a run has learned; without names nothing can be told.

    Args:
      learned: names of the run's classes.
      names: those of the set at hand, `what`.
      what: names it in the message.
    """
    if learned is None or names is None or tuple(learned) == tuple(names):
        return
    ours, theirs = (dict(enumerate(given)) for given in (learned, names))
    label = next(label for label in range(len(ours) + len(theirs)) if ours.get(label) != theirs.get(label))
    raise UserError(
        f"label {label} is {ours.get(label, 'no class')} for this run, and {theirs.get(label, 'no class')} in {what}: "
        "give the set that the run was trained on, or one with the same classes"
    )


def _comparable(names: Names, count: int) -> list[str]:
    return [str(label) for label in range(count)] if names is None else list(names)


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()
