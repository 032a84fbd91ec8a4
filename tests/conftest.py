"""One torch thread: with more, test processes wait for each other, and sums depend on the machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
