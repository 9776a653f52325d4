"""The model one layer at a time over many sequences: documents, passes, who looks at products, and how much memory that
takes. What calibration, refining and mixing have in common.
"""
