"""The CLUE study: tables of a sweep in, ``fits.json`` out.

runs         which runs are fitted, and the columns that a study adds
compute      laws in compute: the frontier's power law, log-linear against power law
factors      the factors of the joint law and the forms that it could have
joint        the joint law: fits, forms compared, counting of parameters, curves to draw
laws         the laws that conclusions rest on, each fitted once per choice
aliasing     which factors this sweep can tell apart, and which runs would
losses       the pool loss beside the loss of the training batch and of other pool sizes
limits       which factor limits each cell
choices      what a reader could have chosen otherwise, as data
claims       what a claim is, and how it is evaluated under every choice that concerns it
conclusions  the claims of a study
downstream   downstream loss beside pretraining loss
gains        gains over task-specific systems beside tau
report       all of it as one JSON value
figures      figures of the joint law and of the claims
draw         all figures, as files
"""
