"""What all tests share."""

import os

# Before the native module is first called: small cases are to run on several threads, too.
os.environ["T2_CPU_BYTES_PER_THREAD"] = "512"
