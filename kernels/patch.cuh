// patch.cuh - the part of a plane that all taps of some outputs see, in shared memory.

#include "common.cuh"

// How pixels and taps of one axis lie in the patch: all taps share it, or it is loaded anew for each, without gaps.
struct Axis {
    INDEX pixel_step, tap_step;  // in the patch
    INDEX input_step, extent;    // from one element of the patch to the next; how many there are

    constexpr DEVICE Axis(int pixels, int taps, INDEX stride, INDEX dilation)
        : pixel_step(taps > 1 ? stride : 1),
          tap_step(taps > 1 ? dilation : 0),
          input_step(taps > 1 ? 1 : stride),
          extent((pixels - 1) * pixel_step + (taps - 1) * tap_step + 1)
    {
    }
};

// An element of a plane; zero outside.
DEVICE ACC element_of(const STORAGE* plane, INDEX h, INDEX w, bool is_plane, const Conv& conv)
{
    const bool inside = is_plane && is_within(h, conv.H) && is_within(w, conv.W);
    return inside ? widen(plane[h * conv.x_h + w * conv.x_w]) : ACC(0);
}
