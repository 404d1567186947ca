"""What KBOP is compared with, each as its authors describe it. Nothing in the product's own path imports this package.

Plain binarization (sign × mean) is convert.convert_plain: it is also the shape every binary model starts from.
"""
