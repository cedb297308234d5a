"""What the words on a page mean, for readers who did not make the run."""

from __future__ import annotations

from collections.abc import Collection

VIEWS = {
    "overlay": "the photograph in grey, the masks in their colours over it; dark: outside the foreground",
    "contour": "the photograph with the outlines of the masks",
    "mask": "the masks alone; black: outside the foreground",
    "original": "the photograph",
}
TRUTH = {
    "masks": "the label, white in a pane of its own and its outline over the masks; not over the original",
    "classes": "the label in a pane of its own, in the colours of the masks with the same names and white where pixels "
    "do not count, and its outlines over the masks; not over the original",
    "boxes": "the boxes of the label, white; where they are, the box of the first mask is called correct or wrong",
}
FIGURES = {
    "share": "the part of the image that the first mask covers; the order of the masks is the method's",
    "count": "how many masks an image has",
    "score": "how sure the method is of its masks, mean over those of an image; higher is surer",
    "trust": "how far the first mask can be trusted, by all that agrees on it (raypipe trust): the share of the masks, "
    "of all runs that were compared, that are trusted less. 0 = the most doubtful",
    "agreement": "how well the first masks of several runs meet in an image: 1 = the same pixels, 0 = none in common "
    "(mean IoU of all pairs, as raypipe agree measures it)",
    "pattern_dice_best": "how well a mask meets the label drawn by hand: 1 = the same pixels, 0 = none in common. The "
    "masks and, beside each, the rest of the foreground are tried, and the one that meets the label best counts. So an "
    "empty mask can have a Dice too: that of the whole foreground",
    "saliency_iou": "how well the first mask meets the label: 1 = the same pixels, 0 = none in common",
    "saliency_mae": "how far the first mask, of probabilities where the method has them, is from the label: mean over "
    "the pixels, 0 = nowhere",
    "semantic_miou": "how well the named masks meet the classes of the label: the mean of the IoU of each class in the "
    "image, background included; 1 = the same pixels, 0 = none in common",
    "boxes_box_iou": "how well the box of the first mask meets the nearest true box: 1 = the same, 0 = nothing in "
    "common. Above 0.5 it is correct",
    "seconds": "what the method took for an image, without reading, refining and writing",
}
SIGNS = {
    "empty mask": "a mask without a single pixel, or no mask",
    "mask fills the image": "a mask of more than 99 % of the image separates nothing",
    "unusual area": "the first mask is far smaller or larger than in most images of the run",
    "unusual count": "far fewer or more masks than in most images of the run",
    "low trust": "hardly any mask of the compared runs is trusted less",
    "low score": "the method is far less sure than in most images of the run",
}
NOTES = {
    "whole_image": "no object was told from the background: the whole image counts as foreground",
    "empty_foreground": "no or too little foreground was found: there is nothing to look at",
    "too_small": "the image or its foreground is too small for the method",
    "few_colours": "the foreground has fewer colours than clusters: some masks are empty",
    "no_contrast": "the foreground is of one shade: it has no pattern",
    "no_dark_region": "nothing in the foreground is clearly darker than the rest: the mask is empty",
    "no_variance": "the features are the same everywhere: the masks are empty",
    "flat_map": "the network answers the same everywhere: the mask is empty",
    "few_masks": "fewer than two masks were found inside the foreground",
    "size_skipped": "one of the tile sizes does not fit the image and was left out",
    "degenerate": "the image has one colour, or all its patches are alike: no object can be told from the rest",
    "ambiguous_cut": "another way to cut the image in two is as good as the one that was taken",
    "few_patches": "the image has too few patches to compare",
    "empty_mask": "nothing was found: there is no mask, or it is the whole image where a box was asked for",
    "no_candidate": "nothing passed the method's own tests, so that the best of all the rest was taken: every cluster "
    "reaches from side to side or is too small or large, or every caption of a segment was empty",
    "one_segment": "the image is one segment: no parts of it could be told apart",
    "many_segments": "more segments were found than an image may have: only the clearest cuts count",
    "label_blocked": "a name was passed over for the next best one, for the block-list has the entry that is told",
    "narrow_range": "a 16-bit picture that uses a quarter of its range or less, so that few grey levels are left of it",
    "few_classes": "of few classes the likeliest is likely everywhere, so that little is left as background: name what "
    "else is in the images, or take another --background-score",
    "all_suppressed": "no class is as likely as --pd anywhere: the likeliest one was kept",
    "refine_rejected": "refining emptied a mask: it is kept as it was before",
}


def glossary(
    figures: dict[str, str], signs: Collection[str], notes: Collection[str], truth: str | None = None
) -> dict[str, str]:
    """Words of a page and what they mean.

    figures: titles by name. signs: what is odd. notes: of the images. truth: what labels hold, masks, classes or boxes.
    """
    words = {name.capitalize(): text for name, text in VIEWS.items()}
    words |= {"Truth": TRUTH[truth]} if truth else {}
    words |= {title: FIGURES[name] for name, title in figures.items() if name in FIGURES}
    words |= {sign.capitalize(): text for sign, text in SIGNS.items() if sign in signs}
    return words | {note: NOTES[note] for note in dict.fromkeys(map(kind, notes)) if note in NOTES}


def kind(note: str) -> str:
    """What a remark is called without what it tells: that before a colon."""
    return note.partition(":")[0]
