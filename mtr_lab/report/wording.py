"""The words of tables and charts: the name of a policy, and how many images or videos."""


def shown_name(policy: str) -> str:
    """The name of a policy for readers; in settings and files the unreduced model is the policy ``none``."""
    return "unreduced" if policy == "none" else policy


def grouped(number: int) -> str:
    """Digits in groups of three: 1 000."""
    return f"{number:,}".replace(",", " ")


def counted(numbers: set[int], task: str) -> str:
    """How much was evaluated: "1 image", "20 to 1 000 videos"."""
    noun = "video" if task == "video" else "image"
    if not numbers:
        return f"no {noun}s"
    ends = dict.fromkeys([min(numbers), max(numbers)])
    return f"{' to '.join(map(grouped, ends))} {noun}{'' if numbers == {1} else 's'}"
