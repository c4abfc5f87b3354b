"""Messages between the training process, a fork server and a confined program.

Control socket (training process and server): PARENT with a pidfd; the server replies STARTED.
Then, per program and split: JOB with the program's socket; STOP; the server ends the program and
replies REPORT.

Program's socket: the child sends CONFINED; receives HEADER, program, x_train, y_train; sends
FITTED; receives x_test; sends RESULT and n_test * n_classes float64 values, or at any time FAILED
and a text. Arrays are C-ordered raw bytes of this machine.
"""

import struct

PARENT, STARTED, JOB, STOP = b"L", b"S", b"J", b"K"
CONFINED, FITTED, RESULT, FAILED = b"C", b"F", b"P", b"E"

HEADER = struct.Struct("<QQQQQQ")  # seed, n_train, n_features, n_test, n_classes, program bytes
REPORT = struct.Struct("<cid")  # limit exceeded, wait status, CPU seconds
NO_LIMIT, CPU_LIMIT, IDLE_LIMIT, THREAD_LIMIT = b"-", b"c", b"i", b"t"

MAX_ERROR_BYTES = 600
MAX_THREADS = 256
