"""What goes wrong in a run without ending it at once: unreadable videos, and steps with a non-finite loss."""

from dataclasses import dataclass

from optim import BadSteps
from runs.bad_batches import BadBatches
from runs.bad_videos import BadVideos
from runs.console import Console
from utils import UserError


class TrainingDiverged(UserError, FloatingPointError):
    """The loss, or every score of a test, is not finite."""


@dataclass
class Faults:
    """Counts and records faults as they come; `review` ends the run where there are too many."""

    videos: BadVideos
    batches: BadBatches
    steps: BadSteps
    max_bad_steps: int  # skipped steps in a row that end the run
    console: Console
    skipped_before: int = 0  # steps, until the last review

    def start_epoch(self) -> None:
        self.skipped_before = self.steps.read()[0]
        self.batches.forget()

    def review(self, epoch: int, new_videos: int) -> int:
        """Reports and records what is new; all ranks call it together.

        Args:
            new_videos: `videos.pending` summed over ranks.

        Returns:
            The number of steps skipped since the last review.

        Raises:
            TooManyBadVideos: too many videos of the list are unreadable.
            TrainingDiverged: too many steps in a row had a non-finite loss.
        """
        for path, reason in self.videos.share() if new_videos else []:
            self.console.warn_once(f"unreadable video, replaced by another: {path}: {reason}")
        total, _, longest = self.steps.read()
        skipped, self.skipped_before = total - self.skipped_before, total
        if skipped:
            self.batches.write()
        self.batches.forget()
        if longest >= self.max_bad_steps:
            listed = f" (videos listed in {self.batches.file})" if self.batches.file else ""
            raise TrainingDiverged(
                f"the loss was not finite in {longest} steps in a row of epoch {epoch}{listed}; they were "
                "skipped, the last checkpoint is untouched: lower --lr, set --clip_grad, or use --amp bf16 or off"
            )
        return skipped
