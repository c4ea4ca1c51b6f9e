"""A part of the demo images."""

import signal

from gspn2convert.demo_data import DemoSource


class Part:
    """Some of the demo images; the one at a chosen read ends the process as if a user did."""

    def __init__(self, split, count, terminate_at_read=None):
        self.source, self.count = DemoSource(split), count
        self.label_names, self.reads, self.terminate_at_read = self.source.label_names, 0, terminate_at_read

    def __len__(self):
        return self.count

    def read(self, index):
        self.reads += 1
        if self.reads == self.terminate_at_read:
            signal.raise_signal(signal.SIGTERM)
        return self.source.read(index)

    def where(self, index):
        return self.source.where(index)
