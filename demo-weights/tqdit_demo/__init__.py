"""The trained weights of TQDiT's demo model and its judge; `tqdit.demo.weights` finds and checks them."""
