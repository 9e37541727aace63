//! src/figure: what is drawn and where, what is left out, and whether the colours can be told
//! apart.

use std::collections::BTreeSet;

use isobath::figure::{
    Axis, BarChart, BarGroup, Figure, HeatMap, LineChart, PAPER, SERIES, STYLE, ScaleKind, Series,
    Style, Themed, short,
};
use roxmltree::{Document, Node};

const HOSTILE: &str = "</svg><script>alert('&\"')</script>\u{1}\u{0}";

fn line_chart(series: Vec<Series>) -> LineChart {
    let (x, y) = (Axis::linear("tokens"), Axis::linear("loss"));
    LineChart { title: "Loss".into(), x, y, series }
}

fn heat_map(rows: Vec<Vec<f64>>, range: Option<(f64, f64)>) -> HeatMap {
    HeatMap {
        title: "Angular distance".into(),
        x_label: "layer".into(),
        y_label: "blocks apart".into(),
        value_label: "angle / pi".into(),
        first: (1, 1),
        rows,
        range,
    }
}

fn groups(groups: &[&[f64]]) -> Vec<BarGroup> {
    let group = |(n, values): (usize, &&[f64])| {
        BarGroup::new(format!("run {n}"), Style::Nth(n), values.to_vec())
    };
    groups.iter().enumerate().map(group).collect()
}

fn elements<'a>(svg: &'a Document, class: &str) -> Vec<Node<'a, 'a>> {
    let has = |node: &Node| {
        node.attribute("class").is_some_and(|all| all.split_whitespace().any(|c| c == class))
    };
    svg.descendants().filter(has).collect()
}

fn number(node: &Node, attribute: &str) -> f64 {
    node.attribute(attribute).unwrap().parse().unwrap()
}

/// The corners of a path made of M and L, one list for each M.
fn corners(path: &str) -> Vec<Vec<(f64, f64)>> {
    let corner = |text: &str| {
        let (x, y) = text.split_once(',').unwrap();
        (x.parse().unwrap(), y.parse().unwrap())
    };
    path.split('M').skip(1).map(|piece| piece.split('L').map(corner).collect()).collect()
}

/// Lines of the series, not those of the legend.
fn lines(svg: &Document) -> Vec<Vec<Vec<(f64, f64)>>> {
    elements(svg, "fig-line")
        .iter()
        .filter_map(|node| node.attribute("d"))
        .filter(|d| !d.contains('h'))
        .map(corners)
        .collect()
}

fn texts(svg: &Document) -> Vec<String> {
    let text = |node: Node| node.text().unwrap_or_default().to_string();
    svg.descendants().filter(|node| node.has_tag_name("text")).map(text).collect()
}

/// Titles of the things drawn, which a browser shows on hovering.
fn tips(svg: &Document) -> Vec<String> {
    svg.descendants()
        .filter(|node| node.has_tag_name("title") && node.parent() != Some(svg.root_element()))
        .map(|node| node.text().unwrap_or_default().to_string())
        .collect()
}

#[test]
fn figures_are_whole_xml_whatever_the_names_and_every_class_has_a_rule() {
    let named = Series::new(HOSTILE, Style::Nth(0), vec![(1.0, 2.0), (2.0, 3.0)]);
    let mut line = line_chart(vec![named.with_band(vec![(1.0, 1.0, 3.0), (2.0, 2.0, 4.0)])]);
    line.title = HOSTILE.into();
    (line.x.label, line.y.label) = (HOSTILE.into(), HOSTILE.into());
    let hostile_bar = BarGroup::new(HOSTILE, Style::Ordered(0.4), vec![1.0, f64::NAN]);
    let bar = BarChart::of_layers(HOSTILE, Axis::linear(HOSTILE), vec![hostile_bar]);
    let mut heat = heat_map(vec![vec![0.0, f64::NAN], vec![1.0]], None);
    (heat.title, heat.x_label) = (HOSTILE.into(), HOSTILE.into());
    (heat.y_label, heat.value_label) = (HOSTILE.into(), HOSTILE.into());

    let empty = line_chart(Vec::new()).svg();
    for text in [line.svg(), bar.svg(), heat.svg(), empty] {
        let svg = Document::parse(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        let root = svg.root_element();
        assert_eq!(root.attribute("role"), Some("img"));
        let children: Vec<&str> =
            root.children().take(3).map(|child| child.tag_name().name()).collect();
        assert_eq!(children, ["title", "desc", "style"]);
        let view: Vec<f64> = root
            .attribute("viewBox")
            .unwrap()
            .split(' ')
            .map(|number| number.parse().unwrap())
            .collect();
        assert!(view[2] == 380.0 && (200.0..500.0).contains(&view[3]), "{view:?}");
        assert!(!svg.descendants().any(|node| node.has_tag_name("script")));
        for class in svg.descendants().filter_map(|node| node.attribute("class")) {
            for class in class.split(' ') {
                let rule = [format!(".{class}{{"), format!(".{class},")];
                assert!(rule.iter().any(|rule| STYLE.contains(rule)), "no rule for {class}");
            }
        }
    }
}

#[test]
fn points_lie_where_the_axes_say() {
    let points = vec![(0.0, 0.0), (50.0, 1.0), (100.0, 4.0)];
    let text = line_chart(vec![Series::new("a", Style::Nth(0), points)]).svg();
    let svg = Document::parse(&text).unwrap();
    let lines = lines(&svg);
    let [a, b, c] = lines[0][0][..] else { panic!("three corners: {lines:?}") };
    assert!((b.0 - (a.0 + c.0) / 2.0).abs() <= 0.1, "50 is half way to 100: {lines:?}");
    assert!((b.1 - (a.1 + (c.1 - a.1) / 4.0)).abs() <= 0.1, "1 is a quarter of 4: {lines:?}");
    // The y axis goes from the text 0 to the text 4, and the points lie level with both.
    for (value, corner) in [("0", a), ("4", c)] {
        let mark = svg.descendants().find(|node| {
            let ends = node.attribute("class").is_some_and(|class| class.contains("fig-end"));
            ends && node.text() == Some(value)
        });
        let level = number(&mark.unwrap(), "y") - 3.8;
        assert!((level - corner.1).abs() <= 0.15, "{value} is at {level}, not {corner:?}");
    }
    assert!(texts(&svg).contains(&"50".to_string()) || texts(&svg).contains(&"40".to_string()));
    assert_eq!(tips(&svg)[1..], ["a (0, 0)", "a (50, 1)", "a (100, 4)"]);
}

#[test]
fn a_logarithmic_axis_gives_every_factor_the_same_room_and_leaves_out_zero() {
    let points = vec![(1.0, 1.0), (2.0, 10.0), (3.0, 0.0), (4.0, 100.0), (5.0, 1000.0)];
    let mut chart = line_chart(vec![Series::new("a", Style::Nth(0), points)]);
    chart.y.scale = ScaleKind::Log;
    let text = chart.svg();
    let svg = Document::parse(&text).unwrap();
    let lines = lines(&svg);
    let [[a, b], [c, d]] = [&lines[0][0][..], &lines[0][1][..]].map(|l| [l[0].1, l[1].1]);
    assert!((a - b - (c - d)).abs() <= 0.2 && (b - c - (c - d)).abs() <= 0.2, "{lines:?}");
    let note = "1 value cannot be shown on a logarithmic axis and is left out.";
    assert!(texts(&svg).join(" ").contains(note), "{:?}", texts(&svg));
}

#[test]
fn a_value_that_is_not_finite_interrupts_the_line_and_is_counted() {
    let mut points: Vec<_> = (0..10).map(|i| (i as f64, i as f64)).collect();
    (points[4].1, points[9].1) = (f64::NAN, f64::INFINITY);
    let text = line_chart(vec![Series::new("a", Style::Nth(0), points)]).svg();
    let svg = Document::parse(&text).unwrap();
    let pieces: Vec<usize> = lines(&svg)[0].iter().map(Vec::len).collect();
    assert_eq!(pieces, [4, 4]);
    assert!(texts(&svg).contains(&"2 values are not finite and are left out.".to_string()));
    assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
}

#[test]
fn a_long_series_is_thinned_and_keeps_its_spikes_and_its_ends() {
    let mut points: Vec<_> = (0..200_000).map(|i| (i as f64, (i % 7) as f64)).collect();
    (points[123_456].1, points[150_000].1) = (100.0, -50.0);
    let text = line_chart(vec![Series::new("a", Style::Nth(0), points)]).svg();
    assert!(text.len() < 40_000, "{} bytes", text.len());
    let svg = Document::parse(&text).unwrap();
    let line = &lines(&svg)[0][0];
    assert!((400..1600).contains(&line.len()), "{} corners", line.len());
    let (top, bottom) = line.iter().fold((f64::MAX, f64::MIN), |(low, high), (_, y)| {
        (low.min(*y), high.max(*y)) // y grows downwards
    });
    // -50 and 100 lie on the axis' ends.
    assert!((bottom - top - 190.0).abs() <= 0.2, "spikes from {top} to {bottom}");
    let (first, last) = (line[0].0, line[line.len() - 1].0);
    let plot = elements(&svg, "fig-axis")[0].attribute("d").unwrap();
    assert!(plot.starts_with(&format!("M{first},")), "{first}: {plot}");
    assert!(plot.ends_with(&format!("H{last}")), "{last}: {plot}");
}

#[test]
fn what_a_range_cuts_off_is_counted() {
    let points: Vec<_> = (0..20).map(|i| (i as f64, i as f64)).collect();
    let mut chart = line_chart(vec![Series::new("a", Style::Nth(0), points)]);
    chart.y.range = Some((0.0, 15.0));
    let text = chart.svg();
    let svg = Document::parse(&text).unwrap();
    assert!(texts(&svg).contains(&"4 values are outside.".to_string()), "{:?}", texts(&svg));
    let clip = svg.descendants().find(|n| n.attribute("overflow") == Some("hidden")).unwrap();
    assert!(number(&clip, "height") <= 198.0);
}

#[test]
fn bars_stand_on_zero_and_hang_from_it() {
    let chart = BarChart::of_layers(
        "Loss increase",
        Axis::linear("nats"),
        groups(&[&[2.0, -1.0, 0.0, 1.0], &[1.0, f64::NAN, 1.0, 2.0]]),
    );
    let text = chart.svg();
    let svg = Document::parse(&text).unwrap();
    let bars: Vec<_> =
        elements(&svg, "fig-mark").into_iter().filter(|n| n.has_tag_name("rect")).collect();
    let (y, height): (Vec<f64>, Vec<f64>) =
        bars.iter().map(|bar| (number(bar, "y"), number(bar, "height"))).unzip();
    assert_eq!(bars.len(), 7, "one of eight values is not finite");
    let zero = y[0] + height[0];
    assert!((height[0] - 2.0 * height[3]).abs() <= 0.2, "2 is twice 1: {height:?}");
    assert!((y[1] - zero).abs() <= 0.1 && (height[1] - height[3]).abs() <= 0.1, "-1 hangs");
    assert!(height[2] <= 0.1, "0 has no height");
    let left: Vec<f64> = bars.iter().map(|bar| number(bar, "x")).collect();
    assert!(left[0] < left[4] && left[4] < left[1], "groups side by side: {left:?}");
    assert!(tips(&svg).contains(&"run 0, layer 2: -1".to_string()));
    assert!(texts(&svg).contains(&"1 value is not finite and is left out.".to_string()));
}

#[test]
fn a_bar_that_the_range_cuts_off_is_marked_and_its_value_written() {
    let axis = Axis::linear("nats").with_range(Some((0.0, 1.0)));
    let text = BarChart::of_layers("Loss increase", axis, groups(&[&[9.0, 0.5, -3.0]])).svg();
    let svg = Document::parse(&text).unwrap();
    assert_eq!(elements(&svg, "fig-cut").len(), 2);
    let note = texts(&svg).into_iter().find(|text| text.starts_with("Cut off")).unwrap();
    assert_eq!(note, "Cut off: layer 1: run 0 9; layer 3: run 0 -3.");
}

#[test]
fn many_bars_are_stacked_over_one_scale() {
    let values: Vec<f64> = (1..=24).map(|layer| 1.0 / layer as f64).collect();
    let halves: Vec<f64> = values.iter().map(|value| value / 2.0).collect();
    let all = groups(&[&values, &halves, &values, &halves]);
    let text = BarChart::of_layers("Loss increase", Axis::linear("nats"), all).svg();
    let svg = Document::parse(&text).unwrap();
    let bars: Vec<_> =
        elements(&svg, "fig-mark").into_iter().filter(|n| n.has_tag_name("rect")).collect();
    assert_eq!(bars.len(), 96);
    let [first, second] = [0, 24].map(|n| (number(&bars[n], "x"), number(&bars[n], "height")));
    assert_eq!(first.0, second.0, "one above the other");
    assert!((first.1 - 2.0 * second.1).abs() <= 0.2, "{first:?}, {second:?}: one scale");
    assert!(texts(&svg).iter().any(|text| text == "run 3"));
}

#[test]
fn a_heat_map_has_a_cell_for_each_value_with_row_zero_at_the_bottom() {
    let rows = vec![vec![0.0, 0.5, 1.0], vec![0.25, f64::NAN], vec![2.0]];
    let text = heat_map(rows, Some((0.0, 1.0))).svg();
    let svg = Document::parse(&text).unwrap();
    let cells: Vec<_> = svg
        .descendants()
        .filter(|node| node.has_tag_name("rect") && node.has_children())
        .map(|cell| (number(&cell, "x"), number(&cell, "y"), cell.attribute("fill")))
        .collect();
    assert_eq!(cells.len(), 6);
    assert_eq!(cells[0].2, Some("#440154"));
    assert_eq!(cells[1].2, Some("#21918c"));
    assert_eq!(cells[2].2, Some("#fde725"));
    assert_eq!(cells[4].2, None, "not finite");
    assert_eq!(cells[5].2, Some("#fde725"), "above the range: its end");
    assert!(cells[0].0 < cells[1].0 && cells[0].0 == cells[3].0 && cells[0].0 == cells[5].0);
    assert!(cells[0].1 > cells[3].1 && cells[3].1 > cells[5].1);
    assert!(tips(&svg).contains(&"layer 1, blocks apart 2: 0.25".to_string()));
    assert!(texts(&svg).contains(&"1 value is not finite and is left out.".to_string()));
}

#[test]
fn long_names_lose_their_middle_and_keep_it_in_the_tip() {
    let name = format!("{}-seed1", "x".repeat(200));
    let text = line_chart(vec![Series::new(&name, Style::Nth(0), vec![(1.0, 1.0)])]).svg();
    let svg = Document::parse(&text).unwrap();
    let shown = texts(&svg).into_iter().find(|text| text.ends_with("-seed1")).unwrap();
    assert!(shown.contains('\u{2026}') && shown.chars().count() < 70, "{shown}");
    assert!(tips(&svg).contains(&name));
}

#[test]
fn numbers_are_written_short() {
    let cases = [
        (0.0, "0"),
        (1.0, "1"),
        (-0.25, "-0.25"),
        (2.5051, "2.51"),
        (42.0, "42"),
        (999.6, "1000"),
        (9876.0, "9876"),
        (12_345.0, "12.3k"),
        (1_500_000.0, "1.5M"),
        (999_999.0, "1M"),
        (2.0e9, "2B"),
        (13.1e12, "13.1T"),
        (3e-4, "3e-4"),
        (0.0123, "0.0123"),
        (f64::NAN, "NaN"),
    ];
    for (value, text) in cases {
        assert_eq!(short(value), text, "{value}");
    }
}

#[test]
fn marks_are_round_and_share_their_unit() {
    let marks = |low: f64, high: f64| -> Vec<String> {
        let series = Series::new("", Style::Nth(0), vec![(low, 0.0), (high, 1.0)]);
        let text = line_chart(vec![series]).svg();
        let svg = Document::parse(&text).unwrap();
        let is_mark = |node: &Node| {
            node.has_tag_name("text")
                && node.attribute("class").is_some_and(|class| class.contains("fig-mid"))
        };
        let text = |node: Node| node.text().unwrap_or_default().to_string();
        svg.descendants().filter(is_mark).map(text).collect()
    };
    assert_eq!(marks(0.0, 2.6e9), ["0", "0.5B", "1.0B", "1.5B", "2.0B", "2.5B"]);
    assert_eq!(marks(0.0, 12.0), ["0", "2", "4", "6", "8", "10", "12"]);
    assert_eq!(marks(0.0, 0.0006), ["0", "1e-4", "2e-4", "3e-4", "4e-4", "5e-4", "6e-4"]);
    assert_eq!(marks(-1.0, 1.0), ["-1.0", "-0.5", "0", "0.5", "1.0"]);
}

/// Red, green and blue in linear light, 0..1.
fn linear(colour: &str) -> [f64; 3] {
    [1, 3, 5].map(|i| {
        let c = f64::from(u8::from_str_radix(&colour[i..i + 2], 16).unwrap()) / 255.0;
        if c <= 0.04045 { c / 12.92 } else { ((c + 0.055) / 1.055).powf(2.4) }
    })
}

/// WCAG 2.2's contrast ratio.
fn contrast(a: &str, b: &str) -> f64 {
    let [a, b] = [a, b].map(|colour| {
        let [r, g, b] = linear(colour);
        0.2126 * r + 0.7152 * g + 0.0722 * b
    });
    (a.max(b) + 0.05) / (a.min(b) + 0.05)
}

type Matrix = [[f64; 3]; 3];

fn times(matrix: &Matrix, vector: [f64; 3]) -> [f64; 3] {
    matrix.map(|row| row.iter().zip(vector).map(|(m, v)| m * v).sum())
}

/// Ottosson, "A perceptual color space for image processing" (2020).
fn oklab(linear: [f64; 3]) -> [f64; 3] {
    let lms = times(
        &[
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ],
        linear.map(|c| c.clamp(0.0, 1.0)),
    );
    times(
        &[
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ],
        lms.map(f64::cbrt),
    )
}

#[test]
fn series_can_be_told_apart_from_the_paper_and_with_every_kind_of_colour_vision() {
    // Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color
    // Vision Deficiency" (2009), severity 1.
    let visions: [(&str, Matrix); 4] = [
        ("all cones", [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]),
        (
            "protanopia",
            [
                [0.152286, 1.052583, -0.204868],
                [0.114503, 0.786281, 0.099216],
                [-0.003882, -0.048116, 1.051998],
            ],
        ),
        (
            "deuteranopia",
            [
                [0.367322, 0.860646, -0.227968],
                [0.280085, 0.672501, 0.047413],
                [-0.011820, 0.042940, 0.968881],
            ],
        ),
        (
            "tritanopia",
            [
                [1.255528, -0.076749, -0.178779],
                [-0.078411, 0.930809, 0.147602],
                [0.004733, 0.691367, 0.303900],
            ],
        ),
    ];
    let schemes: [fn(Themed) -> &'static str; 2] = [|c| c.light, |c| c.dark];
    for pick in schemes {
        let colours = SERIES.map(pick);
        assert_eq!(BTreeSet::from(colours).len(), SERIES.len());
        for colour in colours {
            let ratio = contrast(colour, pick(PAPER));
            assert!(ratio >= 3.0, "{colour} on {}: contrast {ratio:.2}", pick(PAPER));
        }
        for (vision, matrix) in &visions {
            let seen = colours.map(|colour| oklab(times(matrix, linear(colour))));
            for a in 0..seen.len() {
                for b in 0..a {
                    let squares = (0..3).map(|i| (seen[a][i] - seen[b][i]).powi(2));
                    let distance = squares.sum::<f64>().sqrt();
                    // About 0.02 is just visible side by side.
                    let least = 0.09;
                    assert!(
                        distance >= least,
                        "{} and {} with {vision}: {distance:.3}, at least {least}",
                        colours[a],
                        colours[b]
                    );
                }
            }
        }
    }
}
