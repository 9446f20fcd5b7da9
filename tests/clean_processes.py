"""Processes that inherit nothing from the tests that ran before.

A fork of the test process has everything that earlier tests have left there. When it collects a
process group of gloo's, it waits without end for threads that it does not have. These processes
are forks of a server that has done nothing but import.
"""

import multiprocessing

CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(["pretrain.data", "pretrain.processes.rendezvous"])
