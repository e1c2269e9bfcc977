"""What prompts look like, byte for byte, as data (spec sections 3.2 and 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"

# What stands before and behind the task; the tail is missing where only the user's turn is recorded.
TASK_HEAD = "Generate robot actions for the task:\n"
TASK_END = " /no_cot"
TAIL = "<|im_end|>\n<|im_start|>assistant\n<cot></cot><|im_end|>\n"

VIDEO_FPS = 24
"""The rate that a video's time stamps are counted at where nobody states one, as nobody does for the released ones."""


@dataclass(frozen=True)
class Template:
    """What stands between the pictures. intro: before all. before_title, behind_title: around a view's title, whose
    pictures follow. outro: between the last view and the task."""

    intro: str
    before_title: str
    behind_title: str
    outro: str


TEMPLATES = {
    "titled": Template("The following observations are captured from multiple views.\n", "# ", "\n", ""),
    "cameras": Template("", "", ": ", "\n"),
}
"""Name in an embodiment profile -> template."""

INSTRUCTION_RULES = ("given", "sentence", "bare")
"""How the task enters a prompt: as it comes; with a capital and a full stop, without outer blanks; without outer blanks
and one final full stop."""


@dataclass(frozen=True)
class PromptForm:
    """A profile's prompt, apart from titles and task. stamps: what stands before each of a view's pictures, one for a
    still picture, one for each temporal patch of a video. pad: what is repeated for a picture's tokens."""

    template: str = "titled"
    stamps: tuple[str, ...] = ("",)
    pad: str = IMAGE_PAD


TITLED = PromptForm()


def video_form(template: str, frames: int, temporal_patch: int) -> PromptForm:
    """Of views that are videos of so many frames: each temporal patch is stamped with the mean of its first and last
    frame's time, in seconds to one decimal (spec section 8)."""
    ends = [(first, first + temporal_patch - 1) for first in range(0, frames, temporal_patch)]
    stamps = tuple(f"<{(first + last) / 2 / VIDEO_FPS:.1f} seconds>" for first, last in ends)
    return PromptForm(template, stamps, VIDEO_PAD)


def build_prompt(
    titles: Sequence[str], image_tokens: Sequence[int], instruction: str, form: PromptForm = TITLED
) -> str:
    """The prompt for one observation.

    titles: one per view, as the embodiment orders them; views one behind the other share a title, and their pictures
    follow each other. image_tokens: tokens after the merge of each view's picture, or of each temporal patch of its
    video. instruction: as prompt_text returns it. Raises ValueError for another number of pictures.
    """
    per_view = len(form.stamps)
    if len(image_tokens) != len(titles) * per_view:
        raise ValueError(f"image_tokens: expected {per_view} for each of {len(titles)} views, got {len(image_tokens)}")
    template = TEMPLATES[form.template]
    parts = [f"<|im_start|>user\n{template.intro}"]
    for number, title in enumerate(titles):
        if number == 0 or title != titles[number - 1]:
            parts.append(template.before_title + title + template.behind_title)
        counts = image_tokens[number * per_view : (number + 1) * per_view]
        for stamp, count in zip(form.stamps, counts, strict=True):
            parts.append(f"{stamp}<|vision_start|>{form.pad * count}<|vision_end|>")
        if number + 1 == len(titles) or title != titles[number + 1]:
            parts.append("\n")
    return "".join([*parts, template.outro, TASK_HEAD, instruction, TASK_END, TAIL])
