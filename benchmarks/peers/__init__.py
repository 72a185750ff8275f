"""Speed and memory of this library next to those of other tools, side by side on one machine.

    python -m benchmarks.peers --list
    python -m benchmarks.peers --make-environments
    python -m benchmarks.peers [NAME ...]
    python -m benchmarks.peers --table

A question (`questions`) has cases and sides: this library and its peers. Each side is a process of its own (`child`), in an
environment of its own where it needs one (`environments`). All sides of a case get the same weights (`shapes`), inputs
(`inputs`), cores and threads, prove first that they compute the same numbers, and are then measured in turns (`rounds`). The
ratio of a round compares times that were taken close to each other, so a drift of the machine cancels. `results` keeps the
figures with the code (`sources`) and packages that they belong to, and draws the tables. The machine must be idle otherwise.
"""
