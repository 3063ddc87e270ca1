"""The skipping of steps whose loss or gradient norm jumps, without waiting for the device.

One batch of bad data can undo days of training. Its step is left out, as by the `SkipStepOptimizer`
of AllenAI's OLMo-core; but skipped steps stay out of the statistics, so that a row of spikes does
not raise the bar for the next, and the row has a limit.
"""

import torch


class SpikeGuard:
    """Compares each step's loss and gradient norm with those of the last accepted steps.

    A step is a spike where either is more than `sigma` standard deviations above its mean over the
    last `window` accepted steps. Until that many have been accepted the guard only watches. After
    `max_in_row` spikes one after another the level itself has changed: the next step is accepted
    and the window starts again from it, so the guard can't hold a run up for ever.

    Everything is decided and kept on the device. All ranks must give the same values, for they must
    decide alike.

    Args:
        sigma: standard deviations above the mean that make a spike; above 0.
        window: accepted steps to compare with; at least 2.
        max_in_row: spikes one after another before a step is accepted whatever its height; at least
            1.
        device: where loss and gradient norm are.

    Raises:
        ValueError: a value out of those bounds.
    """

    def __init__(self, sigma: float, window: int, *, max_in_row: int = 10, device: torch.device | str = "cpu") -> None:
        if not sigma > 0 or window < 2 or max_in_row < 1:
            raise ValueError(
                f"sigma={sigma}, window={window}, max_in_row={max_in_row}: sigma must be above 0, window at least 2 "
                "and max_in_row at least 1"
            )
        self.sigma = sigma
        self.window = window
        self.max_in_row = max_in_row
        self.history = torch.zeros(window, 2, device=device)
        """(window, 2) float32, a ring: loss and gradient norm of the accepted steps."""
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        """Steps accepted since the window started, spikes in a row up to now, spikes in all."""
        self._slots = torch.arange(window, device=device)

    def check(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """Says whether a step is a spike, by its loss and its gradient norm before clipping,
        scalars on the device, and notes it.

        A step where one of them is not finite is no spike and leaves no trace here: it is skipped
        for that reason.

        Returns:
            A float32 scalar on the device: 1 for a spike, which must be skipped, else 0.
        """
        measured = torch.stack([loss.detach().float(), grad_norm.detach().float()])
        accepted, row, total = self.counts.unbind()
        finite = torch.isfinite(measured).all()
        full = accepted >= self.window
        deviation, mean = torch.std_mean(self.history, dim=0)
        high = (measured > mean + self.sigma * deviation).any() & full & finite
        restart = high & (row >= self.max_in_row)
        spike = high & ~restart
        taken = finite & ~spike
        # A window that starts again forgets what it held: its first slot is this step's.
        accepted = torch.where(restart, torch.zeros_like(accepted), accepted)
        here = (self._slots == accepted % self.window) & taken
        self.history = torch.where(here[:, None], measured, self.history)
        row = torch.where(taken, torch.zeros_like(row), row + spike)
        self.counts = torch.stack([accepted + taken, row, total + spike])
        return spike.float()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The window and the counts, with which a resumed run decides as an unbroken one."""
        return {"history": self.history, "counts": self.counts}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Takes a saved state over, whose window is as long as this one's."""
        self.history = state["history"].to(self.history.device)
        self.counts = state["counts"].to(self.counts.device)
