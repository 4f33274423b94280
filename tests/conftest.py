"""For all tests: Triton's interpreter where there is no GPU; Hypothesis without deadlines (a busy machine is no
defect), and with the same examples in every CI run."""

import os
import signal

import torch
from hypothesis import settings

# The interpreter is chosen when a function is decorated, Triton's own library included: before anything imports triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A shell that starts the suite in the background has it ignore SIGINT, and so would every process that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("igpo", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("igpo")
