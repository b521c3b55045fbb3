def cpu_features() -> dict[str, bool]:
    """Each known CPU feature and whether the CPU and the operating system let programs use it."""

def available_instruction_sets() -> list[str]:
    """The instruction sets this CPU can run, from the plainest ("scalar") to the widest."""

def instruction_set() -> str:
    """The instruction set in use: the widest available until another is set."""

def set_instruction_set(name: str) -> None:
    """Use this instruction set from now on; ValueError where the CPU lacks it."""

def num_cores(root: str = "") -> int:
    """Logical cores this process may use, by affinity and cgroup quota (v2 and v1); at least 1.

    `root` stands before /proc and /sys, for tests.
    """
