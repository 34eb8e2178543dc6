"""The renderer of procedural scenes: exact depth, flow, masks and class, a pure function of an index.

`layout` composes a scene, `objects` makes what stands in it, `geometry` meets rays with it, `textures` and `shading`
colour what they meet. The data set of these scenes is ``data/sources/scenes.py``.
"""
