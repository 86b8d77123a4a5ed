"""The verbs of ccd-train: one file each."""
