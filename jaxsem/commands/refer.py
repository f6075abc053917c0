"""`jaxsem refer`: the region of an image that a phrase refers to, found among compressed features."""

from argparse import Namespace

import numpy as np

from jaxsem.cache import enable_compilation_cache
from jaxsem.commands import console
from jaxsem.commands.weights import open_codec
from jaxsem.data.images import check_suffix, read_image, write_image
from jaxsem.errors import InputError
from jaxsem.files import check_output
from jaxsem.systems import regions
from jaxsem.systems.feature_codec import FeatureCodec
from jaxsem.systems.feature_tasks import refer

DEFAULT_PRESET = "pqvae-mini"
_DIMMED = 0.35


def run(args: Namespace) -> int:
    """Finds the phrase of `args`; returns the exit status."""
    if not args.phrase.strip():
        raise InputError("the phrase is empty: write what to look for, such as 'the small green cross'")
    if args.output is not None:
        check_suffix(args.output)
        check_output(args.output, args.force)
    image = read_image(args.image)
    masks = candidates(args, image)
    enable_compilation_cache()
    codec = open_codec(args.preset, args.weights, DEFAULT_PRESET, args.quality, clip=args.clip)
    if not isinstance(codec, FeatureCodec):
        raise InputError(f"{codec.name} compresses images, not features: name a preset such as {DEFAULT_PRESET}")
    found = refer(codec, image, args.phrase, masks, compress=not args.original, in_place=args.in_place)
    if args.output is not None:
        write_image(args.output, highlighted(image, found.mask), args.force)
    if args.json:
        record = {"image": args.image, "phrase": args.phrase, "box": list(found.box), "score": found.score}
        console.say_json({**record, "region": found.region, "regions": len(found.scores), "bits": found.bits})
    else:
        left, top, right, bottom = found.box
        size = f"{len(found.scores)} regions in {found.bits} bits" if found.bits else f"{len(found.scores)} regions"
        console.say(
            f"{args.image}: {left},{top},{right},{bottom} (left, top, right, bottom), score {found.score:.3f}; {size}"
        )
    return 0


def candidates(args: Namespace, image: np.ndarray) -> np.ndarray:
    """The regions that `args` names, bool [r, h, w]: boxes, masks of a file, those of SAM, or areas of like colour.

    Raises:
      InputError: More than one way is named, or a file or box is none.
    """
    ways = [name for name in ("box", "masks", "sam") if getattr(args, name)]
    if len(ways) > 1:
        raise InputError(f"regions come from one of --box, --masks and --sam, not from {len(ways)}: name one")
    if args.box:
        return regions.from_boxes([regions.parse_box(text) for text in args.box], image.shape[:2])
    if args.masks:
        return regions.read_masks(args.masks, image.shape[:2])
    if args.sam:
        from jaxsem.systems.mask_generator import MaskGenerator

        return MaskGenerator.load(args.sam).masks(image)
    return regions.propose(image)


def highlighted(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image with everything but the region darkened and drained of colour."""
    grey = image.mean(axis=2, keepdims=True) * _DIMMED
    return np.where(mask[..., None], image, grey).astype(np.uint8)
