package verdict

// Mode says what becomes of a denial.
type Mode uint8

// The modes. The zero value leaves it to whoever asks.
const (
	ModeDefault   Mode = iota
	ModeEnforce        // it is carried out
	ModeAuditOnly      // it is logged as would-deny, and the connection passes
)

var modeWords = [...]string{ModeDefault: "", ModeEnforce: "enforce", ModeAuditOnly: "audit-only"}

// String gives the word that ParseMode reads; it is empty for ModeDefault.
func (m Mode) String() string {
	if int(m) < len(modeWords) {
		return modeWords[m]
	}
	return "unknown"
}

// ParseMode reads "enforce" or "audit-only"; empty is ModeDefault. It is false for
// any other text.
func ParseMode(text string) (Mode, bool) {
	for m, word := range modeWords {
		if word == text {
			return Mode(m), true
		}
	}
	return ModeDefault, false
}

// Or gives the mode, or another one where it is the default.
func (m Mode) Or(other Mode) Mode {
	if m == ModeDefault {
		return other
	}
	return m
}
