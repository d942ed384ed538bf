//! Which prompts begin alike: a radix tree over token ids, reduced to the prefixes worth keeping.

/// A shared prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// The next shorter prefix that this one continues.
    pub parent: Option<usize>,
    /// A prompt that begins with it.
    pub prompt: usize,
    /// Its tokens, counted from the beginning of the prompt.
    pub len: usize,
}

/// Prefixes of at least `least` tokens beyond their parent that several prompts share, parents before children; and for each prompt the
/// longest one that it begins with, leaving at least one token of its own.
#[must_use]
pub fn shared_prefixes(prompts: &[&[u32]], least: usize) -> (Vec<Prefix>, Vec<Option<usize>>) {
    let mut order: Vec<usize> = (0..prompts.len()).collect();
    order.sort_by(|&a, &b| prompts[a].cmp(prompts[b]));
    let mut prefixes = vec![];
    let mut of_prompt = vec![None; prompts.len()];
    split(prompts, &order, None, 0, least.max(1), &mut prefixes, &mut of_prompt);
    (prefixes, of_prompt)
}

/// Handles prompts that are sorted and agree on their first `len` tokens.
fn split(
    prompts: &[&[u32]],
    mut order: &[usize],
    parent: Option<usize>,
    len: usize,
    least: usize,
    prefixes: &mut Vec<Prefix>,
    of_prompt: &mut [Option<usize>],
) {
    while let Some(&first) = order.first() {
        // Those that have one more token in common; a prompt that ends here stands alone.
        let same = |p: usize| prompts[p].get(len).is_some() && prompts[p].get(len) == prompts[first].get(len);
        let n = order.iter().take_while(|p| same(**p)).count().max(1);
        let (group, rest) = order.split_at(n);
        order = rest;
        if group.len() == 1 {
            of_prompt[first] = parent;
            continue;
        }
        let last = group[group.len() - 1];
        // In sorted order the first and the last agree on what all agree on. Each prompt keeps a token of its own, whose logits it needs.
        let common = prompts[first].iter().zip(prompts[last]).take_while(|(a, b)| a == b).count();
        let shortest = group.iter().map(|p| prompts[*p].len()).min().unwrap_or(0);
        let common_kept = common.min(shortest - 1);
        let me = if common_kept >= len + least {
            prefixes.push(Prefix { parent, prompt: first, len: common_kept });
            Some(prefixes.len() - 1)
        } else {
            parent
        };
        if common_kept < common {
            // Some prompt ends where the others go on, or all are equal: they differ by their last tokens only.
            group.iter().for_each(|p| of_prompt[*p] = me);
            continue;
        }
        split(prompts, group, me, common, least, prefixes, of_prompt);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_document_with_questions_is_kept_once() {
        let document: Vec<u32> = (0..100).collect();
        let prompts: Vec<Vec<u32>> = (0..3).map(|q| [&document[..], &[500 + q, 7]].concat()).collect();
        let mut slices: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let other = [9, 9, 9];
        slices.push(&other);
        let (prefixes, of_prompt) = shared_prefixes(&slices, 16);
        assert_eq!(prefixes, [Prefix { parent: None, prompt: 0, len: 100 }]);
        assert_eq!(of_prompt, [Some(0), Some(0), Some(0), None]);
    }

    #[test]
    fn a_system_prompt_with_documents_makes_a_tree() {
        let system: Vec<u32> = vec![1; 20];
        let prompts: Vec<Vec<u32>> =
            (0..4u32).map(|i| [&system[..], &[100 + i / 2; 30], &[i]].concat()).collect();
        let slices: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let (prefixes, of_prompt) = shared_prefixes(&slices, 16);
        let lens: Vec<_> = prefixes.iter().map(|p| (p.parent, p.len)).collect();
        assert_eq!(lens, [(None, 20), (Some(0), 50), (Some(0), 50)]);
        assert_eq!(of_prompt, [Some(1), Some(1), Some(2), Some(2)]);
    }

    #[test]
    fn equal_prompts_share_all_but_their_last_token() {
        let prompt = [5u32; 40];
        let (prefixes, of_prompt) = shared_prefixes(&[&prompt, &prompt], 16);
        assert_eq!((prefixes.len(), prefixes[0].len), (1, 39));
        assert_eq!(of_prompt, [Some(0), Some(0)]);
    }

    proptest! {
        #[test]
        fn every_prefix_is_one(
            prompts in prop::collection::vec(prop::collection::vec(0u32..3, 1..24), 1..24),
            least in 1usize..6,
        ) {
            let slices: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
            let (prefixes, of_prompt) = shared_prefixes(&slices, least);
            for (i, p) in prefixes.iter().enumerate() {
                let below = p.parent.map_or(0, |up| prefixes[up].len);
                prop_assert!(p.parent.is_none_or(|up| up < i) && p.len >= below + least);
                if let Some(up) = p.parent {
                    let up = &prefixes[up];
                    prop_assert_eq!(&slices[p.prompt][..up.len], &slices[up.prompt][..up.len]);
                }
                prop_assert!(of_prompt.contains(&Some(i)) || prefixes.iter().any(|c| c.parent == Some(i)));
            }
            for (prompt, prefix) in slices.iter().zip(&of_prompt) {
                if let Some(p) = prefix {
                    let p = &prefixes[*p];
                    prop_assert!(prompt.len() > p.len);
                    prop_assert_eq!(&prompt[..p.len], &slices[p.prompt][..p.len]);
                }
            }
        }
    }
}
