"""One torch thread: two test processes on two cores otherwise wait for each other, and sums would depend on the machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
