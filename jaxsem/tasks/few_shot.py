"""Few-shot classification: some labelled pictures, and one more whose label is among theirs.

Source: papers/2 (Bridging compressed image latents and multimodal large language models), A.1: five pictures of different
classes and a new one of one of these classes, 5,000 times.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence

from jaxsem.data.scenes import SceneConfig, render, sample_scene
from jaxsem.data.scenes.draws import Draws
from jaxsem.data.scenes.world import check_size
from jaxsem.errors import InputError
from jaxsem.tasks.examples import Example, Picture, scene_name

_STREAM = 2**63 + 2**40  # of `Draws`; those of scenes and questions lie below
_ALONE = SceneConfig(objects=(1, 1))
_POOL = 2000  # scenes: some thirty of each of 64 classes


@dataclasses.dataclass(frozen=True)
class Episode:
    """Which items make one example.

    Attributes:
        support: Those shown with their labels, `shots` of each of `ways` labels, in random order.
        query: The one asked about: not in the support, but of one of its labels.
    """

    support: tuple[int, ...]
    query: int


def episodes(labels: Sequence[str], count: int, *, ways: int = 5, shots: int = 1, seed: int = 0) -> list[Episode]:
    """Draws episodes from labelled items, all labels being equally likely.

    Args:
        labels: The label of each item.
        count: How many episodes.
        ways: Labels in an episode, at least 2.
        shots: Items shown of each.
        seed: Of the choice.

    Raises:
        InputError: Fewer than `ways` labels have more than `shots` items, or a number is out of range.
    """
    if count < 1 or ways < 2 or shots < 1:
        raise InputError(f"{count} episodes of {ways} ways and {shots} shots cannot be drawn: use 1, 2 and 1 or more.")
    members = defaultdict(list)
    for item, label in enumerate(labels):
        members[label].append(item)
    usable = sorted(label for label, items in members.items() if len(items) > shots)
    if len(usable) < ways:
        raise InputError(
            f"{len(usable)} of {len(members)} labels have more than {shots} item(s), but {ways} are needed for "
            f"{ways}-way {shots}-shot episodes: give more items or fewer ways."
        )
    draws = Draws(_STREAM, seed)
    return [_episode(draws, members, usable, ways, shots) for _ in range(count)]


def _episode(draws: Draws, members: dict[str, list[int]], usable: list[str], ways: int, shots: int) -> Episode:
    chosen = _some(draws, usable, ways)
    asked = draws.pick(chosen)
    shown, query = [], None
    for label in chosen:
        items = _some(draws, members[label], shots + (label == asked))
        if label == asked:
            query = items.pop()
        shown += items
    return Episode(tuple(_some(draws, shown, len(shown))), query)


def _some(draws: Draws, items: Sequence, count: int) -> list:
    rest = list(items)
    return [rest.pop(draws.integer(0, len(rest) - 1)) for _ in range(count)]


def few_shot_examples(
    pictures: Sequence[Picture], labels: Sequence[str], count: int, *, ways: int = 5, shots: int = 1, seed: int = 0
) -> list[Example]:
    """Few-shot examples of labelled pictures, such as ImageNet's.

    Args:
        pictures: The pictures.
        labels: Their labels.
        count: How many examples.
        ways: As for `episodes`.
        shots: As for `episodes`.
        seed: As for `episodes`.

    Raises:
        InputError: As from `episodes`, or not as many labels as pictures.
    """
    if len(pictures) != len(labels):
        raise InputError(f"there are {len(labels)} labels for {len(pictures)} pictures: give one for each.")
    return _examples(episodes(labels, count, ways=ways, shots=shots, seed=seed), pictures, labels)


def few_shot_scenes(
    split: str,
    count: int,
    config: SceneConfig = _ALONE,
    size: int | tuple[int, int] = 128,
    *,
    ways: int = 5,
    shots: int = 1,
    seed: int = 0,
    pool: int = _POOL,
) -> list[Example]:
    """Few-shot examples of scenes with one object, whose class is the label.

    Args:
        split: "train", "valid" or "test".
        count: How many examples.
        config: Which scenes are drawn, of one object each.
        size: Side of the pictures, or (height, width).
        ways: As for `episodes`.
        shots: As for `episodes`.
        seed: As for `episodes`.
        pool: Examples are made of the first so many scenes; only those that occur are rendered.

    Raises:
        InputError: As from `episodes` and `sample_scene`, or scenes of several objects.
    """
    if config.objects != (1, 1):
        raise InputError(f"objects={config.objects} leaves open what the label is: use objects=(1, 1).")
    height_width = check_size(size)
    scenes = [sample_scene(split, index, config) for index in range(pool)]
    labels = [scene.objects[0].name for scene in scenes]
    drawn = episodes(labels, count, ways=ways, shots=shots, seed=seed)
    used = sorted({item for episode in drawn for item in (*episode.support, episode.query)})
    pictures = {
        item: Picture(scene_name(split, item, config), render(scenes[item], height_width), height_width)
        for item in used
    }
    return _examples(drawn, pictures, labels)


def _examples(
    drawn: Sequence[Episode], pictures: Sequence[Picture] | Mapping[int, Picture], labels: Sequence[str]
) -> list[Example]:
    return [
        Example(
            form="few_shot",
            picture=pictures[episode.query],
            answer=labels[episode.query],
            support=tuple((pictures[item], labels[item]) for item in episode.support),
        )
        for episode in drawn
    ]
