"""An exact laboratory of finite MDPs: the theory that TRPO is taught from, as something that runs (docs/lab.md)."""
