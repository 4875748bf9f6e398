"""Which rows of a table are as a checkpoint has them, so that an increment holds the others."""

from __future__ import annotations

from typing import Any

import torch


class SavedRows:
    """The rows of a table that have not changed since a checkpoint, and the ids that went.

    It takes a byte for each row that the checkpoint has. Rows numbered later are changed rows, as
    all are that were not there. Nothing here waits for a GPU.

    Args:
        checkpoint: which one; kept for the caller.
        num_rows: rows numbered when it was made: all of them are as it has them.
        device: where the table lives.
        versions: what must stay the same for this to hold; kept for the caller.

    Attributes:
        deleted: ids that were taken out, each [n] int64; some repeat, or were never there.
    """

    def __init__(
        self, checkpoint: Any, num_rows: int, device: torch.device, versions: Any = None
    ) -> None:
        self.checkpoint = checkpoint
        self.versions = versions
        self.deleted: list[torch.Tensor] = []
        with torch.inference_mode(False):  # it outlives the mode that it is made in
            # One more, which is never as saved, stands for all rows beyond, and for MISSING.
            self._is_saved = torch.ones(num_rows + 1, dtype=torch.bool, device=device)
            self._is_saved[num_rows] = False

    def change(self, rows: torch.Tensor) -> None:
        """Rows [N] int64 are about to change, or to get other ids. They may repeat."""
        self._is_saved.index_fill_(0, self._places(rows), False)

    def delete(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Ids [N] int64 with rows [N], ``MISSING`` where there is none, are about to go."""
        self.deleted.append(ids.clone())
        self.change(rows)

    def changed(self, rows: torch.Tensor) -> torch.Tensor:
        """Those of rows [N] int64 that are not as in the checkpoint."""
        return rows[~self._is_saved[self._places(rows)]]

    def _places(self, rows: torch.Tensor) -> torch.Tensor:
        last = self._is_saved.numel() - 1
        return torch.where((rows >= 0) & (rows < last), rows, last)
