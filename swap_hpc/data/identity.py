"""The identity of a data set: a run does not continue with other data than it began with."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from swap_hpc.data.dataset import Dataset
from swap_hpc.data.splits import Split


@dataclass(frozen=True)
class SplitIdentity:
    samples: int
    sha256: str  # of the files' names and labels; for data in memory, of the data

    @classmethod
    def of(cls, split: Split) -> "SplitIdentity":
        contents = "\n".join(split.contents)
        return cls(len(split), hashlib.sha256(contents.encode()).hexdigest())


@dataclass(frozen=True)
class Identity:
    """The identity of a data set, equal for the same data on any rank, machine and path."""

    classes: tuple[str, ...]  # in the order of their numbers
    train: SplitIdentity
    test: SplitIdentity
    validation: SplitIdentity | None = None

    @classmethod
    def of(cls, dataset: Dataset) -> "Identity":
        return cls(
            tuple(map(str, dataset.classes)),
            SplitIdentity.of(dataset.train),
            SplitIdentity.of(dataset.test),
            None if dataset.validation is None else SplitIdentity.of(dataset.validation),
        )

    @classmethod
    def from_json(cls, text: str) -> "Identity":
        """Reverse `to_json`."""
        fields = json.loads(text)
        return cls(
            tuple(fields["classes"]),
            SplitIdentity(**fields["train"]),
            SplitIdentity(**fields["test"]),
            SplitIdentity(**fields["validation"]) if "validation" in fields else None,
        )

    def to_json(self) -> str:
        return json.dumps({name: each for name, each in asdict(self).items() if each is not None})

    def classes_differ(self, now: "Identity") -> str | None:
        """Describe briefly how the classes of other data differ from these; None: they are equal.

        Args:
            now: the data at hand, where `self` are those of an earlier run.
        """
        if self.classes == now.classes:
            return None
        lost = [name for name in self.classes if name not in now.classes]
        new = [name for name in now.classes if name not in self.classes]
        parts = []
        if lost:
            parts.append(f"{', '.join(lost[:3])} then")
        if new:
            parts.append(f"{', '.join(new[:3])} now")
        return f"other classes: {', '.join(parts)}" if parts else "the classes in another order"

    def differ(
        self, now: "Identity", splits: Sequence[str] = ("train", "validation", "test")
    ) -> str | None:
        """Describe briefly how other data differ from these; None: they are equal.

        Args:
            now: the data at hand, where `self` are those of an earlier run.
            splits: the splits to compare besides the classes.
        """
        if classes := self.classes_differ(now):
            return classes
        if "train" in splits and self.train != now.train:
            return _change("training", self.train, now.train)
        if "validation" in splits and self.validation != now.validation:
            return _change("validation", self.validation, now.validation)
        if "test" in splits and self.test != now.test:
            return _change("test", self.test, now.test)
        return None


def _change(name: str, then: SplitIdentity | None, now: SplitIdentity | None) -> str:
    before, after = (0 if each is None else each.samples for each in (then, now))
    change = "other names, labels or contents" if before == after else f"{after:,} now"
    return f"{before:,} {name} samples then, {change}"
