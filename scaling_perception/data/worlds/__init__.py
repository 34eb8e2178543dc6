"""Furnished worlds of triangles, ray traced: the data behind models that have to work on photographs.

``meshes`` bodies, ``bank`` textures, ``build`` a world of them, ``furniture`` and ``outdoors`` composed things,
``layout`` where they stand and from where they are seen, ``light`` and ``frame`` the pictures, ``camera`` the film.
"""
