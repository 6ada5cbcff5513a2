"""What tells one state of a data set from another, so that a run does not go on with other data than it began with."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from swap_hpc.data.splits import Dataset, Split


@dataclass(frozen=True)
class SplitIdentity:
    samples: int
    sha256: str  # of the names and labels of its files; of data in memory, of the data

    @classmethod
    def of(cls, split: Split) -> "SplitIdentity":
        return cls(len(split), hashlib.sha256("\n".join(split.contents).encode()).hexdigest())


@dataclass(frozen=True)
class Identity:
    """Alike for the same data on any rank, machine and path."""

    classes: tuple[str, ...]  # their places are the labels
    train: SplitIdentity
    test: SplitIdentity

    @classmethod
    def of(cls, dataset: Dataset) -> "Identity":
        return cls(
            tuple(map(str, dataset.classes)),
            SplitIdentity.of(dataset.train),
            SplitIdentity.of(dataset.test),
        )

    @classmethod
    def from_json(cls, text: str) -> "Identity":
        """The reverse of `to_json`."""
        fields = json.loads(text)
        return cls(
            tuple(fields["classes"]),
            SplitIdentity(**fields["train"]),
            SplitIdentity(**fields["test"]),
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def classes_differ(self, now: "Identity") -> str | None:
        """How the classes of data at hand differ from these, in a few words; None where they do not."""
        if self.classes == now.classes:
            return None
        lost = [name for name in self.classes if name not in now.classes]
        new = [name for name in now.classes if name not in self.classes]
        told = [
            f"{', '.join(names[:3])} {when}"
            for names, when in ((lost, "then"), (new, "now"))
            if names
        ]
        return f"other classes: {', '.join(told)}" if told else "the classes in another order"

    def differ(self, now: "Identity", splits: Sequence[str] = ("train", "test")) -> str | None:
        """How data at hand differ from these, in a few words; None where they do not."""
        if classes := self.classes_differ(now):
            return classes
        for name, then, here in (
            ("training", self.train, now.train),
            ("test", self.test, now.test),
        ):
            if name.startswith(tuple(splits)) and then != here:
                same = (
                    "other names, labels or contents"
                    if then.samples == here.samples
                    else f"{here.samples:,} now"
                )
                return f"{then.samples:,} {name} samples then, {same}"
        return None
