//! Every op, every instruction set, one shared test each: the variant is an argument.
mod attention;
mod fixture;
mod gather_attention;
mod rope_append;
mod route;
mod topk;
