//! The promises of the depth allocation.

use bpo::Error;
use bpo::depth::{Candidates, allocate_depth};
use bpo::progress::Progress;
use proptest::prelude::*;

proptest! {
    #[test]
    fn floor_cap_and_sum_hold(
        pairs in prop::collection::vec((0i64..20, 0i32..6, -100i32..100), 1..200),
        extra in 0usize..200,
        every_prompt: bool,
        cap in prop::option::of(1usize..6),
        weights in prop::option::of(prop::collection::vec(0.0f64..3.0, 6)),
    ) {
        let prompts: Vec<i64> = pairs.iter().map(|pair| pair.0).collect();
        let clusters: Vec<i32> = pairs.iter().map(|pair| pair.1).collect();
        let usefulness: Vec<f64> = pairs.iter().map(|pair| f64::from(pair.2)).collect();
        let sizes: Vec<usize> =
            (0..20).map(|prompt| prompts.iter().filter(|&&other| other == prompt).count()).collect();
        let floor = if every_prompt { sizes.iter().filter(|&&size| size > 0).count() } else { 0 };
        let budget = floor + extra;
        let candidates = Candidates { prompts: &prompts, clusters: &clusters, usefulness: &usefulness };

        let kept =
            allocate_depth(candidates, budget, every_prompt, cap, weights.as_deref(), &Progress::default()).unwrap();

        let limit = cap.unwrap_or(usize::MAX);
        let kept_count = kept.iter().filter(|&&kept| kept).count();
        prop_assert_eq!(kept_count, budget.min(sizes.iter().map(|&size| size.min(limit)).sum()));
        for (prompt, &size) in sizes.iter().enumerate().filter(|(_, size)| **size > 0) {
            let of_prompt = || (0..pairs.len()).filter(|&pair| prompts[pair] == prompt as i64);
            let depth = of_prompt().filter(|&pair| kept[pair]).count();
            prop_assert!((usize::from(every_prompt)..=size.min(limit)).contains(&depth));
            let best = of_prompt().max_by(|&left, &right| {
                usefulness[left].total_cmp(&usefulness[right]).then(right.cmp(&left))
            });
            prop_assert!(kept[best.unwrap()] || !every_prompt);
        }
    }
}

#[test]
fn a_budget_below_the_prompts_is_refused() {
    let candidates = Candidates { prompts: &[7, 8], clusters: &[0, 0], usefulness: &[0.0, 0.0] };
    let error = allocate_depth(candidates, 1, true, None, None, &Progress::default()).unwrap_err();
    assert!(matches!(error, Error::BudgetBelowPrompts { budget: 1, prompts: 2 }));
    assert_eq!(allocate_depth(candidates, 1, false, None, None, &Progress::default()).unwrap(), [true, false]);
}
