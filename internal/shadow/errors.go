package shadow

import (
	"fmt"
	"net/http"
	"time"
)

// Error is a refusal in the words of AWS ("Device Shadow error messages"). The rejected
// topics carry it as a body, the HTTPS data plane as a status and a message.
type Error struct {
	Code        int
	Message     string
	ClientToken string // of the request that was refused; "" when absent or unreadable
}

// The messages of "Device Shadow error messages". Each is shared: answer a request with
// For, and recognise one with errors.Is, which ignores the client token.
var (
	ErrInvalidJSON        = &Error{Code: http.StatusBadRequest, Message: "Invalid JSON"}
	ErrMissingState       = &Error{Code: http.StatusBadRequest, Message: "Missing required node: state"}
	ErrStateNotObject     = &Error{Code: http.StatusBadRequest, Message: "State node must be an object"}
	ErrDesiredNotObject   = &Error{Code: http.StatusBadRequest, Message: "Desired node must be an object"}
	ErrReportedNotObject  = &Error{Code: http.StatusBadRequest, Message: "Reported node must be an object"}
	ErrInvalidVersion     = &Error{Code: http.StatusBadRequest, Message: "Invalid version"}
	ErrInvalidClientToken = &Error{Code: http.StatusBadRequest, Message: "Invalid clientToken"}
	ErrTooDeep            = &Error{Code: http.StatusBadRequest, Message: fmt.Sprintf("JSON contains too many levels of nesting; maximum is %d", MaxDepth)}
	ErrInvalidNode        = &Error{Code: http.StatusBadRequest, Message: "State contains an invalid node"}
	ErrUnauthorized       = &Error{Code: http.StatusUnauthorized, Message: "Unauthorized"}
	ErrForbidden          = &Error{Code: http.StatusForbidden, Message: "Forbidden"}
	ErrVersionConflict    = &Error{Code: http.StatusConflict, Message: "Version conflict"}
	ErrTooLarge           = &Error{Code: http.StatusRequestEntityTooLarge, Message: "The payload exceeds the maximum size allowed"}
	ErrEncoding           = &Error{Code: http.StatusUnsupportedMediaType, Message: "Unsupported documented encoding; supported encoding is UTF-8"}
	ErrTooManyRequests    = &Error{Code: http.StatusTooManyRequests, Message: "Too many requests"}
	ErrInternal           = &Error{Code: http.StatusInternalServerError, Message: "Internal service failure"}
)

// NotFound says that a shadow does not exist. AWS names a named shadow by its own name
// and a classic one by its thing's.
func NotFound(name string) *Error {
	return &Error{Code: http.StatusNotFound, Message: fmt.Sprintf("No shadow exists with name: '%s'", name)}
}

// For returns a copy of e that answers the request with this client token.
func (e *Error) For(clientToken string) *Error {
	return &Error{Code: e.Code, Message: e.Message, ClientToken: clientToken}
}

// Error implements error.
func (e *Error) Error() string {
	return fmt.Sprintf("shadow: %d %s", e.Code, e.Message)
}

// Is reports whether target is the same refusal, whichever request it answers.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Code == e.Code && t.Message == e.Message
}

// Rejected is the body for the rejected topics ("Error response document").
func (e *Error) Rejected(now time.Time) []byte {
	return encode(struct {
		Code        int    `json:"code"`
		Message     string `json:"message"`
		Timestamp   int64  `json:"timestamp"`
		ClientToken string `json:"clientToken,omitzero"`
	}{e.Code, e.Message, now.Unix(), e.ClientToken})
}
