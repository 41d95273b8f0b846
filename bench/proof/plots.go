package proof

import (
	"errors"
	"fmt"
	"image/color"
	"math"
	"os"
	"path/filepath"
	"slices"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

// The plots' files.
const (
	latencyPlot = "latency-by-policies.svg"
	changePlot  = "change-by-policies.svg"
	cdfPlot     = "connect-cdf.svg"
)

// series is a line with its name and its look.
type series struct {
	name   string
	points plotter.XYs
	color  color.Color
	dashed bool
}

// Colours that stay apart for those who see few (Okabe and Ito).
var (
	black   = color.RGBA{A: 255}
	gray    = color.RGBA{R: 120, G: 120, B: 120, A: 255}
	blue    = color.RGBA{R: 0, G: 114, B: 178, A: 255}
	sky     = color.RGBA{R: 86, G: 180, B: 233, A: 255}
	green   = color.RGBA{R: 0, G: 158, B: 115, A: 255}
	orange  = color.RGBA{R: 230, G: 159, B: 0, A: 255}
	yellow  = color.RGBA{R: 214, G: 200, B: 30, A: 255}
	vermil  = color.RGBA{R: 213, G: 94, B: 0, A: 255}
	magenta = color.RGBA{R: 204, G: 121, B: 167, A: 255}
)

// Plot draws the plots for which there are figures into a directory, and gives
// their files' names.
func (r *Results) Plot(dir string) (files []string, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	for _, p := range []struct {
		file, title, x, y string
		series            []series
		logX, logY        bool
	}{
		{latencyPlot, "TCP connect, median", "policies", "µs", r.latencySeries(), true, true},
		{changePlot, "One policy changed, until packets tell so, median", "policies", "ms", r.changeSeries(), true, true},
		{cdfPlot, "TCP connect", "µs", "share of connects at most as long", r.cdfSeries(), true, false},
	} {
		if len(p.series) == 0 {
			continue
		}
		pl := plot.New()
		pl.Title.Text, pl.X.Label.Text, pl.Y.Label.Text = p.title, p.x, p.y
		if p.logX {
			logAxis(&pl.X)
		}
		if p.logY {
			logAxis(&pl.Y)
		}
		if err := addSeries(pl, p.series); err != nil {
			return files, fmt.Errorf("%s: %w", p.file, err)
		}
		spread(&pl.X, p.logX)
		spread(&pl.Y, p.logY)
		makeRoom(pl, p.logY)
		if err := pl.Save(18*vg.Centimeter, 12*vg.Centimeter, filepath.Join(dir, p.file)); err != nil {
			return files, fmt.Errorf("%s: %w", p.file, err)
		}
		files = append(files, p.file)
	}
	return files, nil
}

func logAxis(a *plot.Axis) { a.Scale, a.Tick.Marker = plot.LogScale{}, decades{} }

// spread keeps an axis with a single value from having no length.
func spread(a *plot.Axis, isLog bool) {
	switch {
	case isLog && a.Min == a.Max:
		a.Min, a.Max = a.Min/2, a.Max*2
	case !isLog:
		a.Min = min(a.Min, 0)
	}
}

// makeRoom finds the legend a place where no line is: above them, or, where the
// lines are those of shares, which end at the top right, below.
func makeRoom(pl *plot.Plot, isLog bool) {
	if isLog {
		pl.Legend.Top, pl.Legend.Left = true, true
		pl.Y.Max *= math.Pow(pl.Y.Max/pl.Y.Min, 0.5)
	}
}

// decades marks 1, 2 and 5 of each power of ten.
type decades struct{}

func (decades) Ticks(low, high float64) (ticks []plot.Tick) {
	for e := math.Floor(math.Log10(low)); e <= math.Ceil(math.Log10(high)); e++ {
		for _, m := range []float64{1, 2, 5} {
			if v := m * math.Pow(10, e); v >= low && v <= high {
				ticks = append(ticks, plot.Tick{Value: v, Label: fmt.Sprintf("%g", v)})
			}
		}
	}
	return ticks
}

func addSeries(pl *plot.Plot, all []series) error {
	for _, s := range all {
		line, points, err := plotter.NewLinePoints(s.points)
		if err != nil {
			return err
		}
		line.Color, line.Width, points.Color, points.Shape = s.color, vg.Points(1.2), s.color, draw.CircleGlyph{}
		if s.dashed {
			line.Dashes = []vg.Length{vg.Points(4), vg.Points(3)}
		}
		pl.Add(line)
		if len(s.points) < 10 && !s.dashed {
			pl.Add(points)
		}
		pl.Legend.Add(s.name, line)
	}
	return nil
}

// latencySeries are the medians of connect latency by the number of policies, and
// those of variants without policies as level lines.
func (r *Results) latencySeries() (all []series) {
	groups := []series{
		{name: "Portcullis, policies in the cluster", color: blue},
		{name: "Portcullis, no cache", color: sky},
		{name: "Portcullis, policies on the pod", color: green},
		{name: "iptables and ipset, policies on the pod", color: vermil},
	}
	low, high := math.Inf(1), math.Inf(-1)
	for _, v := range r.variants {
		at := groupOf(v)
		if at < 0 {
			continue
		}
		x := float64(v.policies())
		groups[at].points = append(groups[at].points, plotter.XY{X: x, Y: r.summary(v.name, connectP50).median})
		low, high = min(low, x), max(high, x)
	}
	for _, g := range groups {
		if len(g.points) > 0 {
			all = append(all, g)
		}
	}
	if len(all) == 0 {
		return nil
	}
	for _, level := range []struct {
		variant, name string
		color         color.Color
	}{{none, "no filter", gray}, {conntrack, "conntrack only", black}, {echoName, "bare NFQUEUE echo", orange}, {pinnedName, "the same, read on the packet's CPU", yellow}, {callback, "go-nfqueue callback echo", magenta}} {
		if len(r.rounds[level.variant]) > 0 {
			y := r.summary(level.variant, connectP50).median
			all = append(all, series{level.name, plotter.XYs{{X: low, Y: y}, {X: high, Y: y}}, level.color, true})
		}
	}
	return all
}

// groupOf sorts a variant into latencySeries' groups; -1 for none. Ten policies on
// the pod are ten in the cluster too, but are shown once.
func groupOf(v variant) int {
	switch {
	case v.kind == chainsKind:
		return 3
	case v.kind != agentKind || v.log || v.env != nil:
		return -1
	case v.args != nil:
		return 1
	case v.cluster.elsewhere == 0 && v.cluster.onPod > onPodAlways:
		return 2
	}
	return 0
}

func (r *Results) changeSeries() (all []series) {
	groups := []series{
		{name: "Portcullis, policies in the cluster", color: blue},
		{name: "Portcullis, policies on the pod", color: green},
		{name: "iptables and ipset, policies on the pod", color: vermil},
	}
	for _, c := range r.changes {
		at := 0
		switch {
		case c.Kind == chainsKind:
			at = 2
		case c.OnPod && c.Policies > onPodAlways:
			at = 1
		}
		both := summarize(append(slices.Clone(c.Add), c.Remove...))
		groups[at].points = append(groups[at].points, plotter.XY{X: float64(c.Policies), Y: both.median})
	}
	for _, g := range groups {
		if len(g.points) > 0 {
			all = append(all, g)
		}
	}
	return all
}

// cdfPoints is how many points a distribution is drawn with.
const cdfPoints = 400

func (r *Results) cdfSeries() (all []series) {
	largest := func(name func(int) string, of []int) string { return name(of[len(of)-1]) }
	for _, s := range []struct {
		variant string
		color   color.Color
	}{
		{none, gray}, {conntrack, black}, {echoName, orange}, {pinnedName, yellow}, {callback, magenta},
		{agentName(r.Params.Policies[0]), blue}, {largest(agentName, r.Params.Policies), sky}, {largest(chainsName, r.Params.OnPod), vermil},
	} {
		sorted := slices.Sorted(slices.Values(r.connects[s.variant]))
		if len(sorted) == 0 {
			continue
		}
		var points plotter.XYs
		for i := range cdfPoints {
			share := float64(i+1) / cdfPoints
			points = append(points, plotter.XY{X: percentile(sorted, share*0.999), Y: share * 0.999})
		}
		all = append(all, series{name: s.variant, points: points, color: s.color})
	}
	return all
}

// summary is a figure of a variant over all rounds.
func (r *Results) summary(variant string, what figure) summary {
	return summarize(valuesOf(r.rounds[variant], what))
}

// errNoFigures is for results that nothing can be said of.
var errNoFigures = errors.New("nothing was measured")
