"""What Linux enforces around a program: limits, Landlock, seccomp, namespaces; and a probe of what works here."""
