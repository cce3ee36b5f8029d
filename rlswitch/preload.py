"""Imported by the fork server, and by nothing else: importing it is what makes the server warm."""

import gc

from rlswitch.forkserver import import_modules, leave_group

leave_group()
import_modules()
gc.collect()
gc.freeze()  # a collection in a child would touch, and so copy, every page of these million objects
