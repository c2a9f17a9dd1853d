"""Benchmarks: this filesystem beside what a user would pick instead, in one run.

peers       what is compared: how to find, install and mount each, and to find its processes
inputs      the layers and archives that the workloads work on; made once, then kept in .cache/bench
workload    what a workload is, and the register of all
workloads/  the workloads, one function each
ground      where measurements take place: the scratch directory, or an ext4 of the run's own
site        one measurement: fresh directories, a mount, a child process with a time limit, and no trace afterwards
run         all measurements of a run, round by round
cached      how much of a tree the page cache holds
results     medians, spreads and ratios of a run; its JSON
report      the Markdown table
plots       the plots
ledger      what landed before, one line a run
requests    what the kernel asked a daemon, counted by its own tracepoints
profiling   one workload under a profiler
"""
