"""`python -m t2runtime ...` is the same as `t2 ...`."""

from t2runtime.cli import main

raise SystemExit(main())
