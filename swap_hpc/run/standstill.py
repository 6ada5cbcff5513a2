"""The time for which a value has not changed, as one process sees it by its own clock."""

from dataclasses import dataclass


@dataclass
class Standstill:
    """The seconds in which a value has not changed while this process was not suspended."""

    value: object = None
    seconds: float = 0.0

    def update(self, value: object, passed: float) -> float:
        """Return the seconds since the value changed.

        Args:
            value: as it is now.
            passed: seconds since the last call.
        """
        self.seconds = self.seconds + passed if value == self.value else 0.0
        self.value = value
        return self.seconds
