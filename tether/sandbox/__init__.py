"""Confinement of processes that run models: what they may read, write, call and use up, by what the Linux kernel offers.

A service describes it (:mod:`tether.sandbox.plan`). :mod:`tether.sandbox.enter` is the program that the process starts as: it
confines itself, and only then runs the module that imports a framework or a model's code.
"""
