"""Unfinished work: what a command of many minutes has done is kept, so that the same command goes on after any end.

lock.py       one process at a time works on a file or folder
identity.py   is this the same work, and if it is not, what differs?
folder.py     a locked folder of results, whose identity is checked        used by calibrate, validate and mix
work.py       units of work with a result each, dealt out to processes     used by validate and mix
journal.py    a conversion's finished weights, line by line                used by convert
ranks.py      the processes of torchrun
target.py     the name that a finished result gets must be free
"""
