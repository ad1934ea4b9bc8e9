"""TensorBoard event files beside metrics.jsonl, an option."""

import time

from etils import epath

from sparse_lm.errors import UserError


class TensorBoard:
    """Writes the numbers of a row as scalars. Needs the extra `tensorboard`; TensorFlow is not used."""

    def __init__(self, folder: epath.Path):
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise UserError(
                "logging.tensorboard is set, and tensorboard is not installed: pip install tensorboard"
            ) from error
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(folder))

    def write(self, prefix: str, row: dict) -> None:
        values = [
            self._summary.Value(tag=f"{prefix}/{name}", simple_value=value)
            for name, value in row.items()
            if isinstance(value, (int, float)) and name != "step"
        ]
        event = self._event(wall_time=time.time(), step=row["step"], summary=self._summary(value=values))
        self._writer.add_event(event)

    def close(self) -> None:
        self._writer.close()
