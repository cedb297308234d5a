"""Dense features: what a frozen network, or a simple description, says of each patch of an image.

This room knows arrays: RGB images in, one vector per cell of a grid out. It may import `types`, `lookup`, `networks`
and libraries, the heavy ones where they are used; never storage, inputs, run, runtime, pipeline or Ray, and no method
or refiner: methods on features (`segmenters._discovery`) import it.

`dino` runs vision transformers and `resnet` residual networks, `originals` reads the files that their authors
published, `checkpoints` knows these by name, `descriptors` are other forms of what they give, `grid` knows how an image
becomes patches and back, `clip` says of texts, images and patches what they have in common (`clip_vit`,
`clip_resnet`), `clip_masked` what it says of parts of images, and `color` describes patches by hand, without weights:

>>> import numpy as np
>>> from raypipe.features import color
>>> image = np.zeros((48, 64, 3), np.uint8)
>>> image[16:32, 32:] = (220, 60, 30)  # a red bar in the dark
>>> features = color.describe(image, 16)
>>> features.grid, len(features.patches)
((3, 4), 12)

Alike are patches of one kind. A value per patch becomes one per pixel:

>>> unit = features.patches / features.patches.norm(dim=1, keepdim=True)
>>> red = (unit @ unit[7] > 0.5).reshape(features.grid).numpy()
>>> red.astype(int).tolist()
[[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]
>>> (features.enlarged(red, image.shape[:2]) == (image[..., 0] > 0)).all()
np.True_
"""
