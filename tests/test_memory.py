"""What the process does with freed memory, seen by the pages that the system has to give it anew."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from sdpo_lightning.memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def rounds(number):
    for _ in range(number):
        blocks = [torch.zeros(10 * 2**20, dtype=torch.uint8) for _ in range(4)]
        del blocks

rounds(2)
before = faults()
rounds(5)
print(faults() - before)
keep_freed_memory()
rounds(2)
before = faults()
rounds(5)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc hands memory back so")
def test_a_later_round_finds_the_memory_of_an_earlier_one():
    """Four blocks of 10 MiB are above twice the largest block freed so far, 20 MiB: glibc trims them each time."""
    words = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env={"MALLOC_ARENA_MAX": "1"})
    assert done.returncode == 0, done.stderr
    before, after = (int(line) for line in done.stdout.split())
    # 5 rounds of 40 MiB in pages of 4 KiB are 51,200; with 64 MiB to spare none has to be new.
    assert before > 10_000 and after < 1_000, (before, after)
