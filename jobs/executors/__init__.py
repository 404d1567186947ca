"""Where attempts run: the protocol in `base`, this machine in `local`; refuses to choose which job runs."""
