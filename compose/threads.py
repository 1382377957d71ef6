"""Torch's number of threads, in every thread.

`torch.set_num_threads` holds for a thread once it has asked how many there are, which some operations do and
others do not: a thread whose first work is a product of matrices or a Fourier transform hands it to MKL with
as many threads as the machine has cores. On small matrices these mostly wait for each other (a check-in took
four times the CPU time), and their sums may differ in the last bit.
"""

import torch


def heed() -> None:
    """Called by a thread before its first work: it takes the number of threads that was set."""
    torch.get_num_threads()
