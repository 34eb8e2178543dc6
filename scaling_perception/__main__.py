"""`python -m scaling_perception` is the same as `scaling-perception`."""

from scaling_perception.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
