"""Aligns streaming autoregressive video generators with rewards.

Dimension letters. Docstrings and comments give a tensor's shape in brackets, [B, F, C, h, w]; a letter means the same everywhere:

    B       batch: rows of a call, one for each video or branch
    N       samples: the videos, the (chunk, member, x_t, t) samples or the anchors that one call handles
    G       members of a group
    K       ratios that one sample's loss depends on
    L       chunks of a video
    F       frames: latent frames (of a chunk, unless a docstring says otherwise) before h, w; video frames before H, W.
            F0 and F1: latent frames of the prefix, and from the pivot chunk to the end
    C h w   channels, rows and columns of a latent; C also stands for the channels of a feature map
    3 H W   color channels, rows and columns of video frames, in pixels
    D       elements of one sample or prediction, flattened: F * C * h * w

    In the transformer and in the kernels of attention, positions and modulation:

    T       tokens, of a frame after F and of all frames otherwise; Tq, Tk: queries and keys
    H D     heads, and elements of one head
    E       elements of one token: the width, H * D

    In [T, G, ...] and in the papers' formulas T counts the sampler's denoising steps instead.
"""

import sys

# python -m arcopo_fast.<command> is starting: its imports take seconds, in which Ctrl-C would be a traceback. Others are left alone.
if sys.argv[:1] == ["-m"] and any(word.removeprefix("-m").partition(".")[0] == "arcopo_fast" for word in sys.orig_argv):
    from arcopo_fast.runtime.console import Handler as _Handler
    from arcopo_fast.runtime.console import end as _end

    _Handler(_end).__enter__()
